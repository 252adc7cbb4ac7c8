# shellcheck shell=bash
# What differs between sites: settings, the Python environment, containers.

# site.env of the checkout, also where a job runs from its copy of the code: a site's settings are no part of a run.
load_site() {
  local file=${QSPARSE_SITE:-$ORIGIN/slurm/site.env}
  [ -r "$file" ] || { [ -z "${QSPARSE_SITE:-}" ] && return; die "QSPARSE_SITE=$file cannot be read"; }
  # shellcheck source=slurm/site.env
  source "$file"
}

# Make `python` the one that training needs.
enter_environment() {
  CONTAINER=()
  if [ -n "${QSPARSE_CONTAINER:-}" ]; then
    CONTAINER=("--container-image=$QSPARSE_CONTAINER" "--container-mounts=$(mounts)" "--container-workdir=$PWD")
  fi
  # Modules and activation scripts use variables that are not set.
  set +u
  if [ -n "${QSPARSE_SETUP:-}" ]; then
    eval "$QSPARSE_SETUP" || die "QSPARSE_SETUP failed: $QSPARSE_SETUP"
  elif [ -z "${QSPARSE_CONTAINER:-}${QSPARSE_APPTAINER:-}" ] && [ -r "$ORIGIN/.venv/bin/activate" ]; then
    # shellcheck source=/dev/null
    source "$ORIGIN/.venv/bin/activate"
  fi
  set -u
  if [ -z "${QSPARSE_CONTAINER:-}${QSPARSE_APPTAINER:-}" ] && ! command -v python >/dev/null; then
    die "there is no python on $(hostname): set QSPARSE_SETUP, QSPARSE_CONTAINER or QSPARSE_APPTAINER (slurm/site.env), or run make install"
  fi
}

# The folders that a container sees, as SRC:DST with commas between.
mounts() {
  local folder list=""
  for folder in "$PWD" "$ORIGIN" "${QSPARSE_DATA:-}" "${QSPARSE_RUNS:-}" "$(scratch)"; do
    [ -n "$folder" ] && [ -e "$folder" ] && list+="$(realpath "$folder"):$(realpath "$folder"),"
  done
  echo "${list%,}${QSPARSE_MOUNTS:+,$QSPARSE_MOUNTS}"
}

# What stands before a command so that it runs in the environment of training.
wrapper() {
  [ -z "${QSPARSE_APPTAINER:-}" ] || printf '%s\n' apptainer exec --nv --bind "$(mounts)" "$QSPARSE_APPTAINER"
}

# Run a command in that environment, on this node.
inside() {
  local before=()
  mapfile -t before < <(wrapper)
  if [ ${#CONTAINER[@]} -gt 0 ]; then
    before=(srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" --quiet "${CONTAINER[@]}")
  fi
  # Twice is as good as once.
  PYTHONPATH="$CODE${PYTHONPATH:+:$PYTHONPATH}" "${before[@]}" "$@"
}

scratch() { echo "${QSPARSE_SCRATCH:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}"; }
