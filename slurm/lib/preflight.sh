# shellcheck shell=bash
# Inside of a job, before training: are the nodes fit for it? `pretrain.preflight` looks; bad nodes are left out of the next start.

# Seconds that a node may take.
PREFLIGHT_WAIT=${QSPARSE_PREFLIGHT_WAIT:-180}

preflight() {
  local bad status=0
  [ "${PREFLIGHT:-1}" != 0 ] && [ -z "$SIGNALLED" ] || return 0
  # A job that was given GPUs has none to look at on CPUs instead.
  [ "$DEVICE" != auto ] || [ -z "${SLURM_GPUS_ON_NODE:-}" ] || [ -n "${QSPARSE_PROCESSES_PER_NODE:-}" ] || DEVICE=cuda
  look_at_nodes "$START_DIRECTORY/preflight" --run-directory "$RUN_DIRECTORY" --data "$DATA" --device "$DEVICE" || status=$?
  [ "$status" != 0 ] || return 0
  [ "$status" != 2 ] || leave 2
  bad=$(paste -sd' ' "$START_DIRECTORY/preflight/bad" 2>/dev/null || true)
  # None is named where looking itself went wrong: training would go wrong as well.
  after_training 0 "preflight: ${bad:-it ended with status $status, see above}"
}

# look_at_nodes FOLDER [flags of pretrain.preflight node]
look_at_nodes() {
  local folder=$1 common status=0 before=()
  shift
  mkdir -p "$folder"
  mapfile -t before < <(wrapper)
  common=(--report "$folder" --nodes "$(nodes | head -n "$TRAIN_NODES" | paste -sd' ')" --timeout "$PREFLIGHT_WAIT")
  say "preflight: looking at $(nodes | head -n "$TRAIN_NODES" | paste -sd' ')"
  # A node that does not answer is found by what it does not report: nobody waits for it longer than the others take.
  # 2 is for flags that do not exist, and no node's fault.
  (END_WAIT=$PREFLIGHT_WAIT on_nodes 1 --quiet --time=$((PREFLIGHT_WAIT / 60 + 5)) "${before[@]}" \
    python -m pretrain.preflight node "${common[@]}" --address "$MASTER_ADDR" --port "$MASTER_PORT" --devices "$PROCESSES" \
    --scratch "$(scratch)" "$@") || status=$?
  [ "$status" != 2 ] || return 2
  # Slurm's TERM ends the look: what is missing is no node's fault.
  [ "$SIGNALLED" != TERM ] || return 1
  status=0
  inside python -m pretrain.preflight judge "${common[@]}" --fraction "${QSPARSE_PREFLIGHT_FRACTION:-0.5}" || status=$?
  return "$status"
}

# The whole of slurm/preflight.sh: a look without training.
preflight_job() {
  local runs=${QSPARSE_RUNS:-$PWD/runs}
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    submit_tool
    return
  fi
  check_settings
  enter_environment
  PROCESSES=$(processes) || exit 2
  [ -z "${QSPARSE_DATA:-}" ] || set -- --data "$QSPARSE_DATA" "$@"
  only_shown "python -m pretrain.preflight node --devices $PROCESSES $*, on $(nodes | paste -sd' ')"
  TRAIN_NODES=$(nodes | wc -l) SIGNALLED=""
  node_environment
  rendezvous
  look_at_nodes "$runs/.preflight/$SLURM_JOB_ID" --run-directory "$runs" "$@"
}
