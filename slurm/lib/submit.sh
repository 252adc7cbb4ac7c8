# shellcheck shell=bash
# Outside of a job: submit this very script. DRY_RUN=1 shows instead what would happen.

# submit NAME CONFIG [flags]: a run.
submit() {
  local name=$1 config=$2 status=0
  shift 2
  [ -n "${DRY_RUN:-}" ] || submit_script
  show_submission
  continue_by
  check_settings
  echo "goes on by CONTINUE=$CONTINUE_BY ($(continue_why))"
  enter_environment
  training_flags "$name" "$config" "$@"
  show_run || status=$?
  (submit_script) || status=$?
  return "$status"
}

# A script that does not train.
submit_tool() {
  [ -z "${DRY_RUN:-}" ] || show_submission
  submit_script
}

# This script with its arguments; with DRY_RUN=1 only whether Slurm would take it.
submit_script() {
  local options=()
  command -v sbatch >/dev/null || die "there is no sbatch on $(hostname): submit from a login node of a Slurm cluster"
  read -ra options <<<"${QSPARSE_SBATCH:-}"
  if [ -n "${DRY_RUN:-}" ]; then
    echo "sbatch --test-only"
    exec sbatch --test-only "${options[@]}" "$JOB_SCRIPT" "${ARGUMENTS[@]}"
  fi
  exec sbatch "${options[@]}" "$JOB_SCRIPT" "${ARGUMENTS[@]}"
}

show_submission() {
  echo "would run: sbatch${QSPARSE_SBATCH:+ $QSPARSE_SBATCH} $JOB_SCRIPT ${ARGUMENTS[*]}"
  env | grep -E '^(SBATCH_|QSPARSE_|MLFLOW_|LAUNCHER=|PREFLIGHT=|CONTINUE=|UPDATE_CODE=)' | sort | sed 's/^/  /' || true
}

# The plan, for the nodes and devices that would be asked for.
show_run() {
  local nodes devices status=0
  nodes=$(requested nodes) devices=${QSPARSE_PROCESSES_PER_NODE:-$(requested gpus-per-node)}
  devices=${devices##*:}
  echo
  if ! command -v python >/dev/null; then
    echo "no plan: there is no python on $(hostname) outside of the container. Inside of a job: DRY_RUN=1 sbatch $JOB_SCRIPT ..."
    return
  fi
  echo "the plan, $nodes nodes of $devices processes"
  nodes=$(seq --format=node%.0f "${nodes##*-}" | paste -sd' ')
  show_plan_of "$nodes" "$devices" || status=$?
  echo
  return "$status"
}

# show_plan_of "NAME NAME" PROCESSES: for as many of the nodes as would train.
show_plan_of() {
  local answer
  answer=$(inside python -m pretrain.job fit --nodes "$1" --processes-per-node "$2" -- "${FLAGS[@]}") || return
  eval "$answer"
  inside python -m pretrain.plan "${FLAGS[@]}" --world_size $((TRAIN_NODES * $2))
}

# What sbatch would take for a long option: QSPARSE_SBATCH's, else the script's. Its value may follow behind a blank, and --nodes is -N too.
requested() {
  local value
  value=$({ grep "^#SBATCH " "$JOB_SCRIPT" | cut -d' ' -f2 && echo "${QSPARSE_SBATCH:-}"; } |
    sed -E 's/(^| )-N *([0-9])/\1--nodes=\2/; s/(--[a-z-]+) +([^- ])/\1=\2/g' | tr ' ' '\n' | sed -n "s/^--$1=//p" | tail -n 1)
  echo "${value:-1}"
}

# only_shown WHAT: ends a job that was submitted with DRY_RUN=1, and does not train.
only_shown() {
  [ -n "${DRY_RUN:-}" ] || return 0
  say "DRY_RUN is set: this job would run $*"
  exit 0
}

# Inside of a job that was submitted with DRY_RUN=1.
show_plan() {
  show_plan_of "$(nodes | paste -sd' ')" "$(processes)" || die "this job cannot train, see above"
  say "DRY_RUN is set: nothing is trained"
}
