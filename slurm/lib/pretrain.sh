# shellcheck shell=bash
# A run, from the submission to its end. CONFIG is a file of pretrain/configs; a flag --config wins.

# pretrain NAME CONFIG [flags]
pretrain() {
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    submit "$@"
  else
    run_job "$@"
  fi
}

run_job() {
  local name=$1 config=$2 status=0
  shift 2
  watch_signals
  continue_by
  check_settings
  enter_environment
  training_flags "$name" "$config" "$@"
  say "job $SLURM_JOB_ID, start $((SLURM_RESTART_COUNT + 1)), nodes: $(nodes | paste -sd' ')"
  if [ -n "${DRY_RUN:-}" ]; then
    show_plan
    exit 0
  fi
  take_code
  training_flags "$name" "$config" "$@"
  node_environment
  rendezvous
  begin || status=$?
  case $status in
    0) ;;
    3) leave 0 ;;                # complete
    5) leave "$UNFINISHED" ;;    # somebody has stopped it
    *) leave_early "$status" ;;
  esac
  record_nodes
  preflight
  train
}

# Where Slurm's TERM has ended what comes before training, the run goes on as if it had ended training.
leave_early() {
  [ "$SIGNALLED" != TERM ] || after_training 0
  leave "$1"
}
