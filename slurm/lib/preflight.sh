# shellcheck shell=bash
# Inside of a job, before training: are the nodes fit for it? `pretrain.preflight` looks; bad nodes are left out of the next start.

# Seconds that nodes wait for one that does not come, and then for one that does not end.
PREFLIGHT_WAIT=${QSPARSE_PREFLIGHT_WAIT:-120}

preflight() {
  local bad status=0
  [ "${PREFLIGHT:-1}" != 0 ] && [ -z "$SIGNALLED" ] || return 0
  look_at_nodes "$START_DIRECTORY/preflight" --run-directory "$RUN_DIRECTORY" --data "$DATA" --device "$DEVICE" || status=$?
  [ "$status" != 0 ] || return 0
  bad=$(paste -sd' ' "$START_DIRECTORY/preflight/bad" 2>/dev/null || true)
  # None is named where looking itself went wrong: training would go wrong as well.
  after_training 0 "preflight: ${bad:-it ended with status $status, see above}"
}

# look_at_nodes FOLDER [flags of pretrain.preflight node]
look_at_nodes() {
  local folder=$1 names status=0 before=()
  shift
  names=$(nodes | head -n "$TRAIN_NODES" | paste -sd' ')
  mapfile -t before < <(wrapper)
  mkdir -p "$folder"
  say "preflight: looking at $names"
  # A node that does not answer is found by what it does not report.
  KILL_ON_BAD_EXIT=0 WAIT=$PREFLIGHT_WAIT on_nodes "$PROCESSES" --quiet --time=10 "${before[@]}" python -m pretrain.preflight node \
    --report "$folder" --nodes "$names" --processes-per-node "$PROCESSES" --scratch "$(scratch)" \
    --wait-s "$PREFLIGHT_WAIT" "$@" || true
  inside python -m pretrain.preflight judge --report "$folder" --nodes "$names" --processes-per-node "$PROCESSES" \
    --fraction "${QSPARSE_PREFLIGHT_FRACTION:-0.5}" || status=$?
  return "$status"
}

# The whole of slurm/preflight.sh: a look without training.
preflight_job() {
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    submit_script
    return
  fi
  enter_environment
  PROCESSES=$(processes) || exit 2
  TRAIN_NODES=$(nodes | wc -l) SIGNALLED=""
  node_environment
  rendezvous
  START_DIRECTORY=${QSPARSE_RUNS:-$PWD/runs}/.preflight/$SLURM_JOB_ID
  [ -z "${QSPARSE_DATA:-}" ] || set -- --data "$QSPARSE_DATA" "$@"
  look_at_nodes "$START_DIRECTORY" --run-directory "${QSPARSE_RUNS:-$PWD/runs}" "$@"
}
