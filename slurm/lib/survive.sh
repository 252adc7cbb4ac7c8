# shellcheck shell=bash
# Inside of a job: signals, and what comes after the training processes have ended.

SIGNALLED="" STEP_PID="" SENDER="" CONTINUE_BY="" FATE="" REQUEUED="" SUCCESSOR=""

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
  [ -n "$REQUEUED" ] || FATE=$(fate)
  case $FATE in
    # For the next start: this one's end may never be written down.
    preempted | requeued) [ -z "${START_DIRECTORY:-}" ] || touch "$START_DIRECTORY/preempted" || true ;;
  esac
  case $FATE in
    timeout | preempted | lost)
      # With a grace time the job runs on, and may save.
      [[ $(job_line) != *\ JobState=RUNNING\ * ]] || return 0
      case $CONTINUE_BY in
        requeue) if [ -z "$REQUEUED" ] && timeout 20 scontrol requeue "$(this_job)"; then REQUEUED=1; fi ;;
        # Taken back where the run turns out to be done.
        singleton) [ -n "$SUCCESSOR" ] || submit_successor || true ;;
      esac
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
  local status=$1 why=${2:-} answer failed=0
  # With a grace time Slurm signals the training processes alone.
  [ -n "$SIGNALLED" ] || ! was_preempted "$(job_line)" || SIGNALLED=TERM
  [ "$SIGNALLED" != TERM ] || [ -n "$REQUEUED" ] || FATE=$(fate)
  answer=$(inside python -m pretrain.job end --job "$SLURM_JOB_ID" --restart "$SLURM_RESTART_COUNT" --chain "$JOB_KEY" \
    --tries "${QSPARSE_TRIES:-3}" --status "$status" ${SIGNALLED:+--signal "$SIGNALLED"} ${FATE:+--fate "$FATE"} \
    --ends-here "$(ends_here)" ${why:+--reason "$why"} -- "${FLAGS[@]}") || failed=$?
  if [ "$failed" != 0 ]; then
    # In a job that Slurm is ending no step begins, and a container is one.
    if [ "$SIGNALLED" != TERM ] || [ "$FATE" = cancelled ]; then leave "$failed"; fi
    answer="OUTCOME=again REASON='TERM came'"
  fi
  eval "$answer"
  say "$OUTCOME: $REASON"
  case $OUTCOME in
    finished) leave 0 ;;
    stopped) leave "$UNFINISHED" ;;
    failed) leave $((status ? status : 1)) ;;
    again) go_on ;;
  esac
}

# What Slurm has made of this job, which was sent TERM. Its state says nothing more than COMPLETING then.
fate() {
  local shown
  shown=$(job_line)
  if [ -z "$shown" ]; then
    echo unknown # the controller does not answer
  elif [[ $shown =~ \ Restarts=([0-9]+) && ${BASH_REMATCH[1]} -gt $SLURM_RESTART_COUNT ]]; then
    # By a preemption or by hand, unless it is for a node.
    if [ -n "$(timeout 20 sinfo --noheader --nodes="$SLURM_JOB_NODELIST" --states=down --format=%N)" ]; then echo requeued_lost; else echo requeued; fi
  elif was_preempted "$shown"; then
    echo preempted
  elif [[ $shown == *\ JobState=RUNNING\ * ]]; then
    echo running
  elif [[ $shown == *\ Reason=TimeLimit\ * ]]; then
    echo timeout
  elif [[ $shown =~ \ Reason=(NodeDown|NodeFail) ]]; then
    echo lost
  else
    echo cancelled
  fi
}

# Asked twice where the controller does not answer at first: in doubt a cancelled job would go on. Slurm's KILL comes 30 s after TERM.
job_line() { ask_for_job || ask_for_job || true; }
ask_for_job() { timeout 12 scontrol -o show job "$(this_job)"; }

# was_preempted LINE: in this start. Slurm may still know of an earlier one's.
was_preempted() {
  local start
  [[ $1 =~ \ StartTime=([^ ]+) ]] || return 1
  start=${BASH_REMATCH[1]}
  [[ $1 =~ \ PreemptTime=([0-9][^ ]*) && ! ${BASH_REMATCH[1]} < $start ]]
}

# End without a further start.
leave() {
  [ -z "$SUCCESSOR" ] || timeout 30 scancel "$SUCCESSOR" || true
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && [ -z "${QSPARSE_RUN_PER_ELEMENT:-}" ]; then
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
