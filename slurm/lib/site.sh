# shellcheck shell=bash
# What differs between sites: the Python environment, containers.

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
  PYTHONPATH="$CODE${PYTHONPATH:+:$PYTHONPATH}" "${before[@]}" "$@"
}

scratch() { echo "${QSPARSE_SCRATCH:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}"; }
