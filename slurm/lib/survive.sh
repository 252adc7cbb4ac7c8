# shellcheck shell=bash
# Inside of a job: signals, and what comes after the training processes have ended.

SIGNALLED="" STEP_PID="" SENDER="" REQUEUED=""

# This job for Slurm's clients: an element of an array by that name, since the number of one element is the whole array's.
this_job() {
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
    echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  else
    echo "$SLURM_JOB_ID"
  fi
}

watch_signals() {
  trap 'on_signal USR1' USR1
  trap 'on_signal TERM' TERM
}

# USR1: the time limit comes near (#SBATCH --signal). TERM: preempted, requeued, cancelled or at the time limit.
on_signal() {
  [ "$SIGNALLED" = TERM ] || SIGNALLED=$1
  say "$1: the training processes are to finish their step, save and end"
  # Where Slurm follows processes by cgroups its signals reach torchrun alone: rank 0 finds this file, the others hear it from there.
  [ -z "${START_DIRECTORY:-}" ] || touch "$START_DIRECTORY/signalled" || true
  [ -z "$STEP_PID" ] || [ -n "$SENDER" ] || send_signal
  [ "$1" != TERM ] || go_on_at_once
}

# Slurm ends this script soon, perhaps before training has ended: what must not be lost is done now.
go_on_at_once() {
  # For the next start: this one's end may never be written down.
  [ -z "${START_DIRECTORY:-}" ] || touch "$START_DIRECTORY/preempted" || true
  case $(fate) in
    timeout | preempted | lost)
      if [ -z "$REQUEUED" ] && [ "$CONTINUE_BY" = requeue ] && timeout 20 scontrol requeue "$(this_job)"; then REQUEUED=1; fi
      ;;
  esac
}

# To the processes of the steps, not to this script; again and again, since one that only starts does not listen yet. It ends with the
# step: a signal that is late must not reach what follows.
send_signal() {
  (
    trap 'kill "$!" 2>/dev/null; exit' TERM
    while kill -0 "$STEP_PID" 2>/dev/null; do
      # To an element of an array some versions send it again and again, without end.
      timeout 5 scancel --signal=USR1 "$(this_job)" &
      wait "$!" || true
      sleep 10 &
      wait "$!" || true
    done
  ) &
  SENDER=$!
}

# Train to the end of this job, then go on or not.
train() {
  local status=0
  if [ -z "$SIGNALLED" ]; then
    launch
    [ -z "$SIGNALLED" ] || [ -n "$SENDER" ] || send_signal
    # A signal interrupts `wait`; the status that counts is the one once the process is gone.
    while kill -0 "$STEP_PID" 2>/dev/null; do wait "$STEP_PID" || true; done
    wait "$STEP_PID" || status=$?
  fi
  end_process "$SENDER"
  after_training "$status"
}

# after_training STATUS [WHY]: WHY training was not even begun.
after_training() {
  local status=$1 why=${2:-} fate="" answer failed=0 cancelled=""
  # With a grace time Slurm signals the training processes alone.
  [ -n "$SIGNALLED" ] || [[ $(job_field PreemptTime) =~ ^(None)?$ ]] || SIGNALLED=TERM
  [ "$SIGNALLED" != TERM ] || fate=$(fate)
  [ "$fate" != cancelled ] || cancelled=1
  answer=$(inside python -m pretrain.job end --job "$SLURM_JOB_ID" --restart "$SLURM_RESTART_COUNT" --chain "$JOB_KEY" \
    --tries "${QSPARSE_TRIES:-3}" --status "$status" ${SIGNALLED:+--signal "$SIGNALLED"} ${cancelled:+--cancelled} \
    ${why:+--reason "$why"} -- "${FLAGS[@]}") || failed=$?
  if [ "$failed" != 0 ]; then
    # In a job that Slurm is ending no step begins, and a container is one.
    if [ "$SIGNALLED" != TERM ] || [ -n "$cancelled" ]; then leave "$failed"; fi
    answer="OUTCOME=again REASON='TERM came'"
  fi
  eval "$answer"
  say "$OUTCOME: $REASON"
  case $OUTCOME in
    finished | stopped) leave 0 ;;
    failed) leave $((status ? status : 1)) ;;
    again)
      # Nobody is told of what failed where it is not tried again.
      [ -z "$why" ] || status=1
      go_on "$status" "$fate"
      ;;
  esac
}

# What Slurm has made of this job, which was sent TERM. Its state says nothing more than COMPLETING then.
fate() {
  local shown
  shown=$(timeout 30 scontrol -o show job "$(this_job)" | tr ' ' '\n')
  if [ "$(sed -n 's/^Restarts=//p' <<<"$shown" | head -n 1)" -gt "$SLURM_RESTART_COUNT" ] 2>/dev/null; then
    echo requeued
  elif grep -q '^JobState=RUNNING$' <<<"$shown"; then
    echo running
  elif grep -q '^Reason=TimeLimit$' <<<"$shown"; then
    echo timeout
  elif grep -qE '^PreemptTime=[0-9]' <<<"$shown"; then
    echo preempted
  elif grep -qE '^Reason=(NodeDown|NodeFail)' <<<"$shown"; then
    echo lost
  else
    echo cancelled
  fi
}

# End without a further start.
leave() {
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && [ -z "${SWEEP:-}" ]; then
    # The elements that were to go on from here.
    timeout 30 scancel --state=PENDING "$SLURM_ARRAY_JOB_ID" || true
  fi
  exit "$1"
}

# Something the user must mend: no further start.
refuse() {
  echo "error: $*" >&2
  leave 2
}

# Exit status of a job whose run is neither finished nor goes on by itself (EX_TEMPFAIL): --dependency=afterok must not take it for done.
UNFINISHED=75

# The run starts once more. go_on STATUS FATE
go_on() {
  local status=$1 fate=$2
  if [ "$fate" = requeued ] || [ -n "$REQUEUED" ]; then
    say "Slurm has put the job back into the queue"
    exit 0
  fi
  case $CONTINUE_BY in
    requeue)
      say "goes on in this job: scontrol requeue $(this_job)"
      # It sends TERM to this script at once.
      trap "" TERM
      timeout 60 scontrol requeue "$(this_job)" || { say "error: the job cannot be requeued: submit it again, or choose another CONTINUE" && exit 1; }
      exclude_bad_nodes "$(this_job)"
      ;;
    array)
      if [ "$SLURM_ARRAY_TASK_ID" = "$SLURM_ARRAY_TASK_MAX" ]; then
        say "this was the last element of array $SLURM_ARRAY_JOB_ID: submit the job again to go on"
        exit $((status ? status : UNFINISHED))
      fi
      say "goes on in the next element of array $SLURM_ARRAY_JOB_ID"
      exclude_bad_nodes "$SLURM_ARRAY_JOB_ID"
      ;;
    singleton) submit_successor ;;
    none)
      say "CONTINUE=none: submit the job again to go on"
      exit $((status ? status : UNFINISHED))
      ;;
  esac
  exit 0
}

# The same job once more, which waits until this one has ended, with the environment that the first was submitted with.
submit_successor() {
  local options=() more=() id excluded
  mapfile -t options < <(successor_options)
  read -ra more <<<"${QSPARSE_SBATCH:-}"
  excluded=$(bad_nodes)
  id=$(timeout 60 env -i "${ENVIRONMENT[@]}" "QSPARSE_CHAIN=$JOB_KEY" sbatch --parsable "--dependency=afterany:$SLURM_JOB_ID" \
    "${options[@]}" "${more[@]}" ${excluded:+--exclude="$excluded"} "$JOB_SCRIPT" "${ARGUMENTS[@]}") ||
    { say "error: the next job could not be submitted: submit it yourself to go on" && exit 1; }
  id=${id%%;*}
  # For `python -m pretrain.status`.
  echo "$id" >"$START_DIRECTORY/successor" || true
  say "goes on in job $id"
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
  case ${CONTINUE:-} in
    requeue | none) CONTINUE_BY=$CONTINUE ;;
    array)
      [ -n "$in_array$([ -n "${SLURM_JOB_ID:-}" ] || echo outside)" ] || refuse "CONTINUE=array: this job has no further elements, submit it with --array=1-20%1"
      CONTINUE_BY=array
      ;;
    singleton)
      [ -z "$in_array" ] || refuse "CONTINUE=singleton: an element of an array has no successor, use requeue or array"
      CONTINUE_BY=singleton
      ;;
    "")
      if [ -n "$in_array" ] && [ -z "${SWEEP:-}" ]; then
        CONTINUE_BY=array
      elif [ -n "${SWEEP:-}" ] || [ "$(job_requeue)" != 0 ]; then
        # The scripts ask for it (#SBATCH --requeue).
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
    echo "as set"
  else
    echo "this cluster has JobRequeue=$(job_requeue)"
  fi
}

job_requeue() { cluster_setting JobRequeue; }
cluster_setting() { timeout 30 scontrol show config | sed -n "s/^$1 *= *//p" | head -n 1; }

# Nodes for the next start to leave out, with commas between: those that the look before training has found bad, and those left out
# already. Where all are bad, no node is the cause.
bad_nodes() {
  local bad before
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
