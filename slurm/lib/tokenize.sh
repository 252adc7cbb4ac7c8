# shellcheck shell=bash
# A corpus tokenized by the elements of a job array, each a part of the same job.

tokenize_corpus() {
  local part=""
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    submit_tokenize "$@"
    return
  fi
  [ "${SLURM_JOB_NUM_NODES:-1}" = 1 ] || die "$SLURM_JOB_NUM_NODES nodes, of which one would work: ask for elements instead, --array=0-N"
  if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    # Elements may begin with any number, and lie apart.
    part=$(((SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:-0}) / ${SLURM_ARRAY_TASK_STEP:-1} % SLURM_ARRAY_TASK_COUNT))
    part+=/$SLURM_ARRAY_TASK_COUNT
  fi
  tokenize_flags "$part" "${SLURM_CPUS_PER_TASK:-}" "$@"
  enter_environment
  say "job $(this_job), start $((SLURM_RESTART_COUNT + 1)), on $(hostname): python -m data_tools tokenize ${FLAGS[*]}"
  [ -z "${DRY_RUN:-}" ] || { say "DRY_RUN is set: nothing is tokenized" && exit 0; }
  tokenize_here
}

submit_tokenize() {
  # Nodes that a site asks for are those of training.
  QSPARSE_SBATCH="${QSPARSE_SBATCH:-} --nodes=1"
  if [ -n "${DRY_RUN:-}" ]; then
    show_submission
    tokenize_flags I/N "$(requested cpus-per-task)" "$@"
    echo "an element runs: python -m data_tools tokenize ${FLAGS[*]}"
  fi
  submit_script
}

# tokenize_flags PART CPUS [flags]; sets FLAGS: the user's own win.
tokenize_flags() {
  local part=$1 cpus=$2
  shift 2
  FLAGS=("$@")
  [ -z "$part" ] || has_flag part || FLAGS+=(--part "$part")
  [ -z "$cpus" ] || has_flag workers || FLAGS+=(--workers "$cpus")
}

tokenize_here() {
  local status=0 worker
  # Where a container is a step of its own, srun has to be told.
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  export PYTHONUNBUFFERED=1
  trap tokenize_again USR1
  inside python -m data_tools tokenize "${FLAGS[@]}" &
  worker=$!
  wait "$worker" || status=$?
  exit "$status"
}

# The time limit comes near. What has been killed costs the units in work.
tokenize_again() {
  [ "${CONTINUE:-}" != none ] || { say "USR1: CONTINUE=none: submit the same job again to go on" && exit 1; }
  say "USR1: goes on in this job: scontrol requeue $(this_job)"
  # It ends all processes of this element, this one as well.
  trap "" TERM
  patiently scontrol requeue "$(this_job)" && exit 0
  say "error: the job cannot be requeued: submit the same job again, finished work is kept"
  exit 1
}
