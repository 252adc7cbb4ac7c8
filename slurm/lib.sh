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

# What the user had set, for the jobs that go on from this one: nothing that belongs to this job alone.
mapfile -d '' -t ENVIRONMENT < <(env -0 | grep -zvE '^(SLURM_|SLURMD_|SRUN_|SBATCH_|QSPARSE_CHAIN=)' && env -0 | grep -zE '^(SLURM_CONF=|SBATCH_)')
# Left over from a job that this one was submitted from: srun refuses both.
[ -z "${SLURM_MEM_PER_NODE:-}" ] || unset SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU

# A job that was submitted from inside of another one inherits what Slurm had told that one.
if [ -n "${SLURM_JOB_ID:-}" ] && JOB_SHOWN=$(timeout 30 scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null) && [[ $JOB_SHOWN != *ArrayJobId=* ]]; then
  unset "${!SLURM_ARRAY_@}"
  [[ ! $JOB_SHOWN =~ \ Restarts=([0-9]+) ]] || SLURM_RESTART_COUNT=${BASH_REMATCH[1]}
fi

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

# The script's own first lines, and what it asks Slurm for.
show_help() {
  sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//p}' "$JOB_SCRIPT"
  echo "It asks Slurm for what follows; options of sbatch before the script win, flags behind it are the command's."
  sed -n 's/^#SBATCH /  /p' "$JOB_SCRIPT"
  echo "DRY_RUN=1 bash $JOB_SCRIPT shows what would run. Settings of the site: slurm/site.env. Flags of training: python -m pretrain.train --help"
}
for word in "$@"; do
  if [[ $word =~ ^(-h|--help)$ ]]; then
    show_help
    exit 0
  fi
done

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
  JOB_KEY=$SLURM_ARRAY_JOB_ID${QSPARSE_RUN_PER_ELEMENT:+_$SLURM_ARRAY_TASK_ID}
else
  JOB_KEY=${SLURM_JOB_ID:-}
fi
# Where the first of them has written down its run directory. Clusters that share a file system number their jobs alike.
JOB_NOTE=${QSPARSE_RUNS:-${SLURM_SUBMIT_DIR:-$PWD}/runs}/.jobs/${SLURM_CLUSTER_NAME:-cluster}-$JOB_KEY

CODE=$ORIGIN
# A first start has no note: one of that number is another job's, of long ago.
if [[ $SLURM_RESTART_COUNT != 0 || -n ${QSPARSE_CHAIN:-}${SLURM_ARRAY_JOB_ID:-} ]] && RUN_DIRECTORY=$(cat "$JOB_NOTE" 2>/dev/null) && [ -r "$RUN_DIRECTORY/code/slurm/lib/all.sh" ]; then
  CODE=$RUN_DIRECTORY/code
  # That was for the first of them.
  UPDATE_CODE=""
fi

# shellcheck source=lib/all.sh
source "$CODE/slurm/lib/all.sh"
