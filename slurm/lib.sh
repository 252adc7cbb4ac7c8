# shellcheck shell=bash
# Sourced by the scripts in this folder: what surrounds a run on a Slurm cluster. README.md explains it, site.env the settings.
#
#   pretrain NAME CONFIG [flags]   submit; inside of a job: start, wait, go on
#   tool COMMAND ...               the same for a command that does not train
#   tokenize_corpus [flags]        submit; inside of a job: do a part
#
# What can be decided without Slurm is decided by `python -m pretrain.job`.
set -euo pipefail

SLURM_FOLDER=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Where this code lies: the checkout, or a run's own copy of it, of which the checkout is the origin.
REPOSITORY=$(dirname "$SLURM_FOLDER")
ORIGIN=${ORIGIN:-$REPOSITORY}
# What the script was called with.
[ -n "${ARGUMENTS+set}" ] || ARGUMENTS=("$@")
# shellcheck source=lib/site.sh
source "$SLURM_FOLDER/lib/site.sh"
# shellcheck source=lib/submit.sh
source "$SLURM_FOLDER/lib/submit.sh"
# shellcheck source=lib/launch.sh
source "$SLURM_FOLDER/lib/launch.sh"
# shellcheck source=lib/preflight.sh
source "$SLURM_FOLDER/lib/preflight.sh"
# shellcheck source=lib/survive.sh
source "$SLURM_FOLDER/lib/survive.sh"
# shellcheck source=lib/tools.sh
source "$SLURM_FOLDER/lib/tools.sh"
# shellcheck source=lib/tokenize.sh
source "$SLURM_FOLDER/lib/tokenize.sh"

say() { echo "$(date +%H:%M:%S) $*"; }
die() {
  echo "error: $*" >&2
  exit 2
}

# CONFIG is a file of pretrain/configs; a flag --config wins.
pretrain() {
  load_site
  if [ -z "${SLURM_JOB_ID:-}" ]; then
    submit "$@"
    return
  fi
  JOB_KEY=$(job_key)
  CODE=$(known_code)
  if [ "$CODE" != "$REPOSITORY" ]; then
    # Everything that follows is the copy's, whatever has become of the checkout.
    # shellcheck source=/dev/null
    source "$CODE/slurm/lib.sh"
  fi
  run_job "$@"
}

run_job() {
  local name=$1 config=$2 status=0
  shift 2
  watch_signals
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
  begin || status=$?
  case $status in
    0) ;;
    3) leave 0 ;; # nothing to do
    *) leave "$status" ;;
  esac
  rendezvous
  record_nodes
  preflight
  train
}
