# shellcheck shell=bash
# Inside of a job: from the allocation to running training processes.

nodes() { scontrol show hostnames "$SLURM_JOB_NODELIST"; }

LAUNCHER=${LAUNCHER:-torchrun}

# Seconds for which the other tasks of a step may go on once one has ended; `pretrain.job begin` knows it better.
END_WAIT=120

# What site.env or the user has set, before anything is done by it.
check_settings() {
  local name
  [[ $LAUNCHER =~ ^(torchrun|srun)$ ]] || refuse "LAUNCHER=$LAUNCHER does not exist: use torchrun or srun"
  for name in QSPARSE_TRIES QSPARSE_PROCESSES_PER_NODE; do
    [[ -z ${!name:-} || ${!name} =~ ^[1-9][0-9]{0,5}$ ]] || refuse "$name=${!name} is no number from 1 on"
  done
  [[ ${PREFLIGHT:-1} =~ ^[01]$ ]] || refuse "PREFLIGHT=$PREFLIGHT is neither 0 nor 1"
  name=${QSPARSE_PREFLIGHT_WAIT:-180}
  [[ $name =~ ^[1-9][0-9]{1,4}$ && $name -ge 15 ]] || refuse "QSPARSE_PREFLIGHT_WAIT=$name is no number of seconds from 15 to 99999"
  name=${QSPARSE_PREFLIGHT_FRACTION:-0.5}
  [[ $name =~ ^0?\.[0-9]*[1-9][0-9]*$ ]] || refuse "QSPARSE_PREFLIGHT_FRACTION=$name is no number between 0 and 1"
}

# Training processes of a node.
processes() {
  # Slurm 20.11 does not count them.
  local asked=${SLURM_GPUS_PER_NODE:-} count=${QSPARSE_PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
  count=${count:-${asked##*:}}
  [[ $count =~ ^[1-9][0-9]*$ ]] || die "this job has no GPUs: ask for some (--gpus-per-node), or set QSPARSE_PROCESSES_PER_NODE"
  echo "$count"
}

FLAGS=()

# FLAGS: what pretrain.train is told. The user's own flags win.
training_flags() {
  local name=$1 config=$2 run
  shift 2
  FLAGS=("$@")
  has_flag data.path || [ -z "${QSPARSE_DATA:-}" ] || FLAGS=(--data.path "$QSPARSE_DATA" "${FLAGS[@]}")
  if [ -n "${QSPARSE_RUNS:-}" ] && ! has_flag output_dir; then
    run=$(flag tracking.run_name)
    FLAGS=(--output_dir "$QSPARSE_RUNS/${run:-$name}" "${FLAGS[@]}")
  fi
  has_flag config || FLAGS=(--config "$ORIGIN/pretrain/configs/$config" "${FLAGS[@]}")
  use_copied_settings
}

# The run's own copies of files of settings, where it has them; pretrain.job.snapshot.config_copy has the same rule.
use_copied_settings() {
  local i value copy last=""
  for i in "${!FLAGS[@]}"; do
    value=""
    [[ ${FLAGS[i]} != --config=* ]] || value=${FLAGS[i]#--config=}
    [[ $last != --config ]] || value=${FLAGS[i]}
    last=${FLAGS[i]}
    [ -n "$value" ] || continue
    copy=$CODE/configs/$(printf %s "$value" | sha256sum | cut -c1-8)-$(basename "$value")
    [ ! -r "$copy" ] || FLAGS[i]=${FLAGS[i]%"$value"}$copy
  done
}

has_flag() {
  local flag
  for flag in "${FLAGS[@]}"; do [[ $flag == --$1 || $flag == --$1=* ]] && return; done
  return 1
}

# Value of the last flag of that name.
flag() {
  local i value=""
  for i in "${!FLAGS[@]}"; do
    [[ ${FLAGS[i]} == --$1=* ]] && value=${FLAGS[i]#*=}
    [[ ${FLAGS[i]} == --$1 ]] && value=${FLAGS[i + 1]:-}
  done
  echo "$value"
}

# CODE, the run's own copy of the code: made at its first start, or by UPDATE_CODE=1.
take_code() {
  local answer
  answer=$(inside python -m pretrain.job directory -- "${FLAGS[@]}") || leave_early $?
  eval "$answer"
  answer=$(inside python -m pretrain.job code --source "$ORIGIN" --job "$SLURM_JOB_ID" ${UPDATE_CODE:+--update} -- "${FLAGS[@]}") || leave_early $?
  eval "$answer"
  if ! { mkdir -p "$(dirname "$JOB_NOTE")" && echo "$RUN_DIRECTORY" >"$JOB_NOTE"; } 2>/dev/null; then
    say "warning: $JOB_NOTE cannot be written: this job's next start begins with the code of $ORIGIN"
  fi
}

# Whether to train, and on how many of the nodes; sets TRAIN_NODES, STEP, STEPS, END_WAIT, START_DIRECTORY, QSPARSE_OUTCOME, ...
begin() {
  local answer
  PROCESSES=$(processes) || return 2
  answer=$(inside python -m pretrain.job begin --job "$SLURM_JOB_ID" --restart "$SLURM_RESTART_COUNT" --chain "$JOB_KEY" \
    --tries "${QSPARSE_TRIES:-3}" --nodes "$(nodes | paste -sd' ')" --processes-per-node "$PROCESSES" -- "${FLAGS[@]}") || return
  eval "$answer"
  export QSPARSE_OUTCOME CUDA_DEVICE_MAX_CONNECTIONS
  [ -n "$CUDA_DEVICE_MAX_CONNECTIONS" ] || unset CUDA_DEVICE_MAX_CONNECTIONS
  [ "$(flag resume)" != never ] || FLAGS+=(--resume "$RESUME")
  if [ -n "$JOURNAL_ONLY" ]; then
    FLAGS+=(--tracking.enabled false)
    say "no MLFLOW_TRACKING_URI: metrics stay in $RUN_DIRECTORY; ship them with: $(python_here) -m pretrain.tracking sync $RUN_DIRECTORY"
  fi
}

# MASTER_ADDR and MASTER_PORT: torchrun would look for an address that does not resolve for many minutes.
rendezvous() {
  local head
  head=$(nodes | head -n 1)
  MASTER_ADDR=${MASTER_ADDR:-$(address_of "$head")}
  MASTER_PORT=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))} # below the ports that Linux gives to outgoing connections
  if ! getent ahosts "$MASTER_ADDR" >/dev/null; then
    refuse "MASTER_ADDR=$MASTER_ADDR does not resolve on $(hostname): unset it, or set it to an address of $head that all nodes know"
  fi
  export MASTER_ADDR MASTER_PORT
}

# A node's name where it resolves, else what Slurm reaches it by.
address_of() {
  if getent ahosts "$1" >/dev/null; then
    echo "$1"
  else
    scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
  fi
}

# What the training processes of every node find in their environment, and why.
node_environment() {
  local cache
  cache="$(scratch)/qsparse-$(id -un)"
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}                                           # a failure says why
  export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}   # a collective without its peer ends, not waits
  export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}                                  # 17 s: a link that flaps ends nothing
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True} # less lost between blocks of memory
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}                                   # processes share the cores
  export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1                                 # a crash shows its stack, the log is up to date
  # Compute nodes have no internet: what would look there waits for minutes or fails.
  export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
  export DO_NOT_TRACK=1 MLFLOW_DISABLE_TELEMETRY=true HF_HUB_DISABLE_TELEMETRY=1
  # Home is shared: its locks are slow, and nodes would replace each other's files.
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$cache/torch_extensions} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
  export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor} CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-$cache/cuda}
  export MPLCONFIGDIR=${MPLCONFIGDIR:-$cache/matplotlib} XDG_CACHE_HOME=${XDG_CACHE_HOME:-$cache/xdg}
  use_code
  # Slurm's KILL is the bound, after its KillWait or the partition's GraceTime; torchrun's own is 30 s.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}
  export QSPARSE_PREBUILT=${QSPARSE_PREBUILT:-$ORIGIN/.prebuilt} QSPARSE_CACHE=$cache
  # sbatch's own are not inherited by srun since Slurm 22.05.
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
}

# What Slurm knows of this start, beside environment.txt and packages.txt.
record_nodes() {
  { timeout 60 scontrol show job "$(this_job)" && timeout 60 scontrol show node "$SLURM_JOB_NODELIST"; } >"$START_DIRECTORY/nodes.txt" || true
  # Where a GPU is gone it may hang; the look at the nodes names that one.
  { command -v nvidia-smi >/dev/null && timeout 60 nvidia-smi >"$START_DIRECTORY/nvidia-smi.txt"; } || true
}

# exec srun with what every step on the training nodes needs: on_nodes TASKS_PER_NODE [options] command. It takes the place of the
# shell: run it in one of its own, which Slurm's TERM, sent to all processes of the script, then does not end before its step.
# A task that fails does not make srun end the others (--kill-on-bad-exit): they notice by themselves. Slurm says it to the nodes in a
# message that each answers once its tasks have ended, and sends it again a minute later to one that took longer than MessageTimeout:
# to the next start of this job, whose steps have the same numbers, where a site lets requeued jobs start sooner than the two minutes
# of the default. KILL, for those that are still there after END_WAIT, is answered at once.
on_nodes() {
  local tasks=$1 bind=() options=()
  shift
  # Processes choose their cores themselves; a cluster that binds nothing warns of the option.
  [[ $(cluster_setting TaskPlugin) == task/none ]] || bind=(--cpu-bind=none)
  mapfile -t options < <(container)
  exec srun --nodes="$TRAIN_NODES" --nodelist="$(nodes | head -n "$TRAIN_NODES" | paste -sd,)" --ntasks=$((TRAIN_NODES * tasks)) \
    --ntasks-per-node="$tasks" --overcommit --kill-on-bad-exit=0 --wait="$END_WAIT" "${bind[@]}" --export=ALL "${options[@]}" "$@"
}

# The training processes; STEP_PID is srun's.
launch() {
  local before=() script=node tasks=1
  mapfile -t before < <(wrapper)
  [ "$LAUNCHER" = torchrun ] || script=rank tasks=$PROCESSES
  say "training from step $STEP of $STEPS: $TRAIN_NODES nodes x $PROCESSES processes, started by $LAUNCHER, $MASTER_ADDR:$MASTER_PORT"
  export START_DIRECTORY TRAIN_NODES PROCESSES
  mkdir -p "$START_DIRECTORY/ranks"
  on_nodes "$tasks" "${before[@]}" bash "$CODE/slurm/lib/$script.sh" "${FLAGS[@]}" &
  STEP_PID=$!
}
