# shellcheck shell=bash
# Inside of a job: the ways to go on, and which of them is this job's; nodes that the next start leaves out.

# Exit status of a job whose run is neither finished nor goes on by itself (EX_TEMPFAIL): --dependency=afterok must not take it for done.
UNFINISHED=75

# Why nothing starts this run again; nothing where something does.
ends_here() {
  [[ $FATE != requeued* ]] || return 0
  case $CONTINUE_BY in
    none) echo "CONTINUE=none: submit the job again to go on" ;;
    array)
      [ "$SLURM_ARRAY_TASK_ID" != "$SLURM_ARRAY_TASK_MAX" ] ||
        echo "this was the last element of array $SLURM_ARRAY_JOB_ID: submit the job again to go on"
      ;;
  esac
}

# The run starts once more.
go_on() {
  if [[ $FATE == requeued* || -n $REQUEUED ]]; then
    say "Slurm has put the job back into the queue"
    exit 0
  fi
  [ -z "$SUCCESSOR" ] || exit 0
  [ -z "$(ends_here)" ] || exit "$UNFINISHED"
  case $CONTINUE_BY in
    requeue)
      say "goes on in this job: scontrol requeue $(this_job)"
      # It sends TERM to this script at once.
      trap "" TERM
      # The answer may have been lost.
      if patiently scontrol requeue "$(this_job)" || [[ $(fate) == requeued* ]]; then
        exclude_bad_nodes "$(this_job)"
      elif [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
        say "error: the job cannot be requeued: submit it again, or choose another CONTINUE"
        exit 1
      else
        say "the job cannot be requeued: another one goes on"
        submit_successor || exit 1
      fi
      ;;
    array)
      say "goes on in the next element of array $SLURM_ARRAY_JOB_ID"
      exclude_bad_nodes "$SLURM_ARRAY_JOB_ID"
      ;;
    singleton) submit_successor || exit 1 ;;
  esac
  exit 0
}

# The same job once more, which waits until this one has ended, with the environment that the first was submitted with.
submit_successor() {
  local options=() more=() id excluded
  mapfile -t options < <(successor_options)
  read -ra more <<<"${QSPARSE_SBATCH:-}"
  excluded=$(bad_nodes)
  id=$(patiently env -i "${ENVIRONMENT[@]}" "QSPARSE_CHAIN=$JOB_KEY" sbatch --parsable "--dependency=afterany:$SLURM_JOB_ID" \
    "${options[@]}" "${more[@]}" ${excluded:+--exclude="$excluded"} --export=ALL "$JOB_SCRIPT" "${ARGUMENTS[@]}") ||
    { say "error: the next job could not be submitted: submit it yourself to go on" && return 1; }
  SUCCESSOR=${id%%;*}
  # For `python -m pretrain.status`.
  [ -z "${START_DIRECTORY:-}" ] || echo "$SUCCESSOR" >"$START_DIRECTORY/successor" || true
  say "goes on in job $SUCCESSOR"
}

# patiently COMMAND of Slurm's: while its controller does not answer, which may just be started again, for three minutes.
patiently() {
  local until=$((SECONDS + 180))
  until timeout 60 "$@"; do
    if [ "$SECONDS" -gt "$until" ] || timeout 20 scontrol ping 2>/dev/null | grep -q "is UP"; then return 1; fi
    sleep 5
  done
}

# What this job was given, one option a line: its script's header knows nothing of the command line.
successor_options() {
  printf '%s\n' "--job-name=$SLURM_JOB_NAME" "--partition=$SLURM_JOB_PARTITION" "--nodes=$(nodes | wc -l)" "--time=$(job_field TimeLimit)"
  [ -z "${SLURM_JOB_ACCOUNT:-}" ] || echo "--account=$SLURM_JOB_ACCOUNT"
  [ -z "${SLURM_JOB_QOS:-}" ] || echo "--qos=$SLURM_JOB_QOS"
  [ -z "${SLURM_GPUS_PER_NODE:-}" ] || echo "--gpus-per-node=$SLURM_GPUS_PER_NODE"
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || echo "--cpus-per-task=$SLURM_CPUS_PER_TASK"
  option constraint Features
  option reservation Reservation
  option exclude ExcNodeList
  option output StdOut
}

# option NAME FIELD: where the job has it.
option() {
  local value
  value=$(job_field "$2")
  [ -z "$value" ] || [ "$value" = "(null)" ] || echo "--$1=$value"
}

# A path with blanks is a line's rest.
job_field() { timeout 30 scontrol show job "$(this_job)" | sed -n "/\(^\| \)$1=/{s/.*\(^\| \)$1=//;/^\//!s/ .*//;p;q}"; }

# Sets CONTINUE_BY: requeue, array, singleton or none. Asked first of all: after days of training it would be too late to refuse.
continue_by() {
  local in_array=""
  [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || in_array=1
  if [ -n "${QSPARSE_RUN_PER_ELEMENT:-}" ] && [[ ${CONTINUE:-} =~ ^(array|singleton)$ ]]; then
    say "CONTINUE=$CONTINUE is not for a sweep, whose elements are runs of their own: requeue"
    CONTINUE=requeue
  fi
  case ${CONTINUE:-} in
    requeue)
      may_be_requeued || refuse "CONTINUE=requeue: Slurm does not put this job back (Requeue=0, by --no-requeue or the site), use singleton or none"
      CONTINUE_BY=requeue
      ;;
    none) CONTINUE_BY=none ;;
    array)
      [ -n "$in_array$([ -n "${SLURM_JOB_ID:-}" ] || echo outside)" ] || refuse "CONTINUE=array: this job has no further elements, submit it with --array=1-20%1"
      CONTINUE_BY=array
      ;;
    singleton)
      [ -z "$in_array" ] || refuse "CONTINUE=singleton: an element of an array has no successor, use requeue or array"
      CONTINUE_BY=singleton
      ;;
    "")
      if [ -n "${QSPARSE_RUN_PER_ELEMENT:-}" ]; then
        CONTINUE_BY=requeue
      elif [ -n "$in_array" ]; then
        CONTINUE_BY=array
      elif [ "$(job_requeue)" != 0 ] && may_be_requeued; then
        CONTINUE_BY=requeue
      else
        CONTINUE_BY=singleton
      fi
      ;;
    *) refuse "CONTINUE=$CONTINUE does not exist: use requeue, array, singleton or none" ;;
  esac
}

continue_why() {
  if [ -n "${CONTINUE:-}" ]; then
    echo "as set$([ "$CONTINUE_BY" != array ] || echo ", for jobs submitted with --array=1-20%1")"
  else
    echo "this cluster has JobRequeue=$(job_requeue)"
  fi
}

# Outside of a job: the scripts ask for it (#SBATCH --requeue).
may_be_requeued() { [ -z "${SLURM_JOB_ID:-}" ] || [ "$(job_field Requeue)" != 0 ]; }
job_requeue() { cluster_setting JobRequeue; }
cluster_setting() { timeout 30 scontrol show config | sed -n "s/^$1 *= *//p" | head -n 1; }

# Nodes for the next start to leave out, with commas between: those that the look before training has found bad, and those left out
# already. Where all are bad, no node is the cause.
bad_nodes() {
  local bad before
  [ -n "${START_DIRECTORY:-}" ] || return 0
  bad=$(paste -sd, "$START_DIRECTORY/preflight/bad" 2>/dev/null || true)
  [ -n "$bad" ] && { [ "$TRAIN_NODES" = 1 ] || [ "$(wc -l <"$START_DIRECTORY/preflight/bad")" -lt "$TRAIN_NODES" ]; } || return 0
  before=$(job_field ExcNodeList)
  [ "$before" = "(null)" ] || [ -z "$before" ] || bad=$before,$bad
  echo "$bad"
}

# From a job that waits.
exclude_bad_nodes() {
  local bad
  bad=$(bad_nodes)
  [ -n "$bad" ] || return 0
  if timeout 60 scontrol update JobId="$1" ExcNodeList="$bad"; then
    say "excluded from the next start: $bad; to take them back: scontrol update JobId=$1 ExcNodeList="
  else
    say "warning: $bad could not be excluded"
  fi
}
