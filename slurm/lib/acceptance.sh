# shellcheck shell=bash
# The cases of `pretrain.acceptance`, one step of this job after the other, and the report.

acceptance() {
  local folder status=0
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    submit_tool
    return
  fi
  enter_environment
  check_settings
  PROCESSES=$(processes) || exit 2
  only_shown "the cases of python -m pretrain.acceptance $*, on $(nodes | paste -sd' '), $PROCESSES processes each"
  node_environment
  rendezvous
  folder=${QSPARSE_RUNS:-$PWD/runs}/acceptance-$SLURM_JOB_ID
  size=(--nodes "$(nodes | wc -l)" --processes-per-node "$PROCESSES")
  trap 'say "the time limit comes near: a report of what there is"; inside python -m pretrain.acceptance report "$folder" "${size[@]}"; exit 1' USR1
  say "acceptance on $(nodes | paste -sd' '), in $folder"
  inside python -m pretrain.acceptance data "$folder"
  run_cases "$folder" "$@"
  # An entry of masks or codes that lies near to its neighbour tips over, here and there: the step after it decides.
  ONCE_MORE=1 run_cases "$folder" "$@"
  inside python -m pretrain.acceptance report "$folder" "${size[@]}" || status=$?
  exit "$status"
}

# run_cases FOLDER [flags]
run_cases() {
  local all=() line fields=()
  mapfile -t all < <(inside python -m pretrain.acceptance cases "${size[@]}" ${ONCE_MORE:+--once-more "$1"})
  for line in "${all[@]}"; do
    IFS=$'\t' read -ra fields <<<"$line"
    run_case "$@" -- "${fields[@]}"
  done
}

# run_case FOLDER [flags] -- NAME KIND DIRECTORY NODES PROCESSES FLAGS...
run_case() {
  local folder=$1 more=() name kind directory started=$SECONDS status=0
  shift
  while [ "$1" != -- ]; do more+=("$1") && shift; done
  name=$2 kind=$3 directory=$4 TRAIN_NODES=$5 PROCESSES=$6
  shift 6
  FLAGS=("$@" --data.path "$folder/shards" --output_dir "$folder/runs/$directory" "${more[@]}")
  START_DIRECTORY=$folder/logs/$name STEP=0 STEPS=""
  mkdir -p "$START_DIRECTORY"
  if ! inside python -m pretrain.acceptance prepare "$folder" "$name" "${size[@]}"; then
    echo "not begun: what it begins with is missing" >"$START_DIRECTORY/status"
    return
  fi
  # As `pretrain.job begin` says it for training.
  unset CUDA_DEVICE_MAX_CONNECTIONS
  if [ "$(flag parallel.tensor)" -gt 1 ] 2>/dev/null && [ "$(flag zero.stage)" != 3 ]; then export CUDA_DEVICE_MAX_CONNECTIONS=1; fi
  # Each start has a port of its own: the one before may still be closing.
  MASTER_PORT=$((MASTER_PORT + 1))
  launch >"$START_DIRECTORY/log" 2>&1 </dev/null
  [[ $kind != killed:* ]] || kill_first_rank "$folder/runs/$directory" "${kind#*:}"
  wait "$STEP_PID" || status=$?
  echo "$status" >"$START_DIRECTORY/status"
  echo $((SECONDS - started)) >"$START_DIRECTORY/seconds"
  say "$name: status $status, $((SECONDS - started)) s"
}

# SIGKILL, once the run has taken so many steps and has a checkpoint to go on from; its owner's file says where the process is.
kill_first_rank() {
  local run=$1 after=$2 steps owner
  while kill -0 "$STEP_PID" 2>/dev/null; do
    steps=$(wc -l 2>/dev/null <"$run/metrics.jsonl" || echo 0)
    if [ "$steps" -gt "$after" ] && compgen -G "$run/checkpoints/step_????????" >/dev/null; then
      owner=$(cat "$run"/.owner/*.json)
      # Before Slurm 22.05 a step that overlaps waits for GPUs and memory nevertheless, unless it asks for none.
      # Slurm may know the owner's machine by another name than its own.
      env -u SLURM_GPUS_PER_NODE timeout 60 srun --overlap --export=ALL --gres=none --mem=0 --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        bash -c "[ \$(uname -n) != '$(field host "$owner")' ] || kill -KILL $(field pid "$owner")" || true
      return
    fi
    sleep 0.1
  done
}

# A value of the owner's JSON.
field() { sed -n "s/.*\"$1\": \"\{0,1\}\([^\",]*\).*/\1/p" <<<"$2"; }
