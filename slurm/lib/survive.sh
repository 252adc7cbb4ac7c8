# shellcheck shell=bash
# Inside of a job: signals, and what comes after the training processes have ended.

SIGNALLED="" STEP_PID="" SENDER=""

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
  [ -z "$STEP_PID" ] || [ -n "$SENDER" ] || send_signal
}

# To the processes of the steps, not to this script; again and again, since one that only starts does not listen yet. It ends with the
# step: a signal that is late must not reach the job's next start.
send_signal() {
  (
    while kill -0 "$STEP_PID" 2>/dev/null; do
      # To an element of an array some versions send it again and again, without end.
      timeout 5 scancel --signal=USR1 "$(this_job)" || true
      sleep 10
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
  [ -z "$SENDER" ] || kill "$SENDER" 2>/dev/null || true
  after_training "$status"
}

# after_training STATUS [WHY]: WHY training was not even begun.
after_training() {
  local status=$1 why=${2:-} answer cancelled=""
  [ "$SIGNALLED" != TERM ] || [ "$(job_state)" != CANCELLED ] || cancelled=1
  answer=$(inside python -m pretrain.job end --job "$SLURM_JOB_ID" --restart "$SLURM_RESTART_COUNT" --chain "$JOB_KEY" \
    --tries "${QSPARSE_TRIES:-3}" --status "$status" ${SIGNALLED:+--signal "$SIGNALLED"} ${cancelled:+--cancelled} ${why:+--reason "$why"} \
    -- "${FLAGS[@]}") || leave $?
  eval "$answer"
  say "$OUTCOME: $REASON"
  case $OUTCOME in
    finished | stopped) leave 0 ;;
    failed) leave $((status ? status : 1)) ;;
    again)
      # Nobody is told of what failed where it is not tried again.
      [ -z "$why" ] || status=1
      go_on "$status"
      ;;
  esac
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

# The run starts once more.
go_on() {
  local status=$1
  if [ "$SIGNALLED" = TERM ] && ! [[ $(job_state) =~ ^(PREEMPTED|TIMEOUT|NODE_FAIL|RUNNING)$ ]]; then
    say "Slurm has put the job back into the queue"
    exit 0
  fi
  case $(continue_by) in
    requeue)
      say "goes on in this job: scontrol requeue $(this_job)"
      # It sends TERM to this script at once.
      trap "" TERM
      timeout 60 scontrol requeue "$(this_job)" || { say "error: the job cannot be requeued: submit it again, or choose another CONTINUE" && exit 1; }
      exclude_bad_nodes "$(this_job)"
      ;;
    array)
      say "goes on in the next element of array $SLURM_ARRAY_JOB_ID"
      exclude_bad_nodes "$SLURM_ARRAY_JOB_ID"
      ;;
    singleton) submit_successor ;;
    none)
      say "CONTINUE=none: submit the job again to go on"
      exit "$status"
      ;;
  esac
  exit 0
}

# The same job once more, which waits until this one has ended.
submit_successor() {
  local options=() id excluded
  mapfile -t options < <(successor_options)
  excluded=$(bad_nodes)
  id=$(QSPARSE_CHAIN=$JOB_KEY timeout 60 sbatch --parsable --dependency=singleton "${options[@]}" ${excluded:+--exclude="$excluded"} \
    "$JOB_SCRIPT" "${ARGUMENTS[@]}") || { say "error: the next job could not be submitted: submit it yourself to go on" && exit 1; }
  say "goes on in job $id"
}

# What this job was given, one option a line: its script's header knows nothing of the command line.
successor_options() {
  printf '%s\n' "--job-name=$SLURM_JOB_NAME" "--partition=$SLURM_JOB_PARTITION" "--nodes=$(nodes | wc -l)" "--time=$(job_field TimeLimit)"
  [ -z "${SLURM_JOB_ACCOUNT:-}" ] || echo "--account=$SLURM_JOB_ACCOUNT"
  [ -z "${SLURM_JOB_QOS:-}" ] || echo "--qos=$SLURM_JOB_QOS"
  [ -z "${SLURM_GPUS_PER_NODE:-}" ] || echo "--gpus-per-node=$SLURM_GPUS_PER_NODE"
  echo "--output=$(job_field StdOut)"
}

job_state() { job_field JobState; }
job_field() { timeout 30 scontrol -o show job "$(this_job)" | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1; }

# requeue, array, singleton or none.
continue_by() {
  local chosen=${CONTINUE:-}
  case $chosen in
    requeue | array | singleton | none) echo "$chosen" ;;
    "")
      if [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && [ -z "${SWEEP:-}" ]; then
        echo array
      elif [ "$(job_requeue)" = 0 ]; then
        echo singleton
      else
        echo requeue
      fi
      ;;
    *) refuse "CONTINUE=$chosen does not exist: use requeue, array, singleton or none" ;;
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
