# shellcheck shell=bash
# Outside of a job: submit this very script. DRY_RUN=1 shows instead what would happen.

submit() {
  local name=$1 config=$2 options=()
  shift 2
  command -v sbatch >/dev/null || die "there is no sbatch on $(hostname): submit from a login node of a Slurm cluster"
  read -ra options <<<"${QSPARSE_SBATCH:-}"
  if [ -n "${DRY_RUN:-}" ]; then
    dry_run "$name" "$config" "${options[@]}" -- "$@"
  else
    # shellcheck disable=SC2153 # the script that sources this one sets it
    exec sbatch "${options[@]}" "$SCRIPT" "$@"
  fi
}

# dry_run NAME CONFIG [sbatch options] -- [flags]; no CONFIG: there is no training to plan.
dry_run() {
  local name=$1 config=$2 options=() nodes devices status=0
  shift 2
  while [ "$1" != -- ]; do options+=("$1") && shift; done
  shift
  CODE=$REPOSITORY
  enter_environment
  echo "would run: sbatch${options[*]:+ ${options[*]}} $SCRIPT $*"
  env | grep -E '^(SBATCH|QSPARSE|MLFLOW|LAUNCHER|PREFLIGHT|CONTINUE)' | sort | sed 's/^/  /' || true
  if [ -n "$config" ]; then
    training_flags "$name" "$config" "$@"
    nodes=$(requested nodes "${options[@]}") devices=${QSPARSE_PROCESSES_PER_NODE:-$(requested gpus-per-node "${options[@]}")}
    echo "goes on by CONTINUE=$(continue_by) ($(continue_why))"
    echo
    echo "the plan, $nodes nodes of $devices processes"
    inside python -m pretrain.plan "${FLAGS[@]}" --world_size $((${nodes%%-*} * devices)) || status=$?
  fi
  echo
  echo "sbatch --test-only"
  sbatch --test-only "${options[@]}" "$SCRIPT" "$@" || status=$?
  return "$status"
}

# What sbatch would take for an option: the last one of the command line, else the script's.
requested() {
  local name=$1 value
  shift
  value=$({ grep "^#SBATCH " "$SCRIPT" | cut -d' ' -f2 && printf '%s\n' "$@"; } | sed -n "s/^--$name=//p" | tail -n 1)
  echo "${value:-1}"
}

# Inside of a job that was submitted with DRY_RUN=1.
show_plan() {
  inside python -m pretrain.plan "${FLAGS[@]}" --world_size "$(($(nodes | wc -l) * $(processes)))" ||
    die "this job cannot train, see above"
  say "DRY_RUN is set: nothing is trained"
}
