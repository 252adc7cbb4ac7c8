# shellcheck shell=bash
# Sourced by the scripts in this folder: what surrounds a run on a Slurm cluster. README.md explains it, site.env the settings.
#
#   pretrain NAME CONFIG [flags]   submit; inside of a job: start, wait, go on
#   tool COMMAND ...               the same for a command that does not train
#   tokenize_corpus [flags]        the same for a part of a corpus
#
# What can be decided without Slurm is decided by `python -m pretrain.job`. A job that has begun a run goes on with the run's own copy of the
# code, whatever becomes of the checkout: this file finds it, and has little else, since it is always the checkout's.
set -euo pipefail

# The checkout, and what the script was called with.
ORIGIN=$(dirname "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)")
ARGUMENTS=("$@")
SLURM_RESTART_COUNT=${SLURM_RESTART_COUNT:-0}
export SLURM_RESTART_COUNT

say() { echo "$(date +%H:%M:%S) $*"; }
die() {
  echo "error: $*" >&2
  exit 2
}

if [ -r "${QSPARSE_SITE:-$ORIGIN/slurm/site.env}" ]; then
  # shellcheck source=site.env
  source "${QSPARSE_SITE:-$ORIGIN/slurm/site.env}"
elif [ -n "${QSPARSE_SITE:-}" ]; then
  die "QSPARSE_SITE=$QSPARSE_SITE cannot be read"
fi

# What all jobs have in common that go on from each other.
if [ -n "${QSPARSE_CHAIN:-}" ]; then
  JOB_KEY=$QSPARSE_CHAIN
elif [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
  # A sweep has a run for each element; else the elements are one run's, one after the other.
  JOB_KEY=$SLURM_ARRAY_JOB_ID${SWEEP:+_$SLURM_ARRAY_TASK_ID}
else
  JOB_KEY=${SLURM_JOB_ID:-}
fi
# Where the first of them has written down its run directory.
JOB_NOTE=${QSPARSE_RUNS:-${SLURM_SUBMIT_DIR:-$PWD}/runs}/.jobs/$JOB_KEY

CODE=$ORIGIN
if [ -n "$JOB_KEY" ] && RUN_DIRECTORY=$(cat "$JOB_NOTE" 2>/dev/null) && [ -r "$RUN_DIRECTORY/code/slurm/lib/site.sh" ]; then
  CODE=$RUN_DIRECTORY/code
  # That was for the first of them.
  UPDATE_CODE=""
fi

# shellcheck source=lib/site.sh
source "$CODE/slurm/lib/site.sh"
# shellcheck source=lib/submit.sh
source "$CODE/slurm/lib/submit.sh"
# shellcheck source=lib/launch.sh
source "$CODE/slurm/lib/launch.sh"
# shellcheck source=lib/preflight.sh
source "$CODE/slurm/lib/preflight.sh"
# shellcheck source=lib/survive.sh
source "$CODE/slurm/lib/survive.sh"
# shellcheck source=lib/pretrain.sh
source "$CODE/slurm/lib/pretrain.sh"
# shellcheck source=lib/tools.sh
source "$CODE/slurm/lib/tools.sh"
# shellcheck source=lib/acceptance.sh
source "$CODE/slurm/lib/acceptance.sh"
# shellcheck source=lib/tokenize.sh
source "$CODE/slurm/lib/tokenize.sh"
