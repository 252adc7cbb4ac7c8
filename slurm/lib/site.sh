# shellcheck shell=bash
# What differs between sites: the Python environment, containers.

# Make `python` the one that training needs.
enter_environment() {
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

# For commands that a person is told; in a container it is the container's.
python_here() {
  if [ -n "${QSPARSE_CONTAINER:-}${QSPARSE_APPTAINER:-}" ]; then echo python; else command -v python; fi
}

# The folders that a container sees, as SRC:DST with commas between: by the names they are called by, and where those lead.
mounts() {
  local folder list=""
  local -A seen=()
  while read -r folder; do
    [ -e "$folder" ] || continue
    for folder in "$folder" "$(realpath "$folder")"; do
      [ -z "${seen[$folder]:-}" ] || continue
      seen[$folder]=1
      list+="$folder:$folder,"
    done
  done < <(seen_folders)
  echo "${list%,}${QSPARSE_MOUNTS:+,$QSPARSE_MOUNTS}"
}

# One a line. What is written to must be there before it is mounted: else it would be written into the container.
seen_folders() {
  local output word
  output=$(flag output_dir)
  output=${output:-$(flag output)}
  output=$(absolute "${output:+$(dirname "$output")}")
  for word in "${QSPARSE_RUNS:-}" "$output"; do [ -z "$word" ] || mkdir -p "$word"; done
  printf '%s\n' "$PWD" "$ORIGIN" "$CODE" "${QSPARSE_DATA:-}" "${QSPARSE_RUNS:-}" "$(scratch)" "$output"
  # Whatever the script's arguments name: shards, a file of settings, corpora, a checkpoint to start from.
  for word in "${ARGUMENTS[@]}"; do
    [[ $word != --*=* ]] || word=${word#*=}
    [[ ! $word =~ [^/] || ! -e $word ]] || absolute "$word"
  done
}

absolute() { [[ -z $1 || $1 == /* ]] && echo "$1" || echo "$PWD/$1"; }

# What srun is told for a step in that environment, where it is a container of Slurm's; one option a line.
container() {
  [ -z "${QSPARSE_CONTAINER:-}" ] ||
    printf '%s\n' "--container-image=$QSPARSE_CONTAINER" "--container-mounts=$(mounts)" "--container-workdir=$PWD"
}

# What stands before a command so that it runs in the environment of training; one word a line.
wrapper() {
  [ -z "${QSPARSE_APPTAINER:-}" ] || printf '%s\n' apptainer exec --nv --bind "$(mounts)" "$QSPARSE_APPTAINER"
}

# CODE comes before everything else, and the working directory, which `python -m` would put first, comes last: it may be the checkout,
# edited meanwhile, or hold a sparsifier of the user's.
use_code() {
  export PYTHONSAFEPATH=1 PYTHONPATH="$CODE:${PYTHONPATH:+$PYTHONPATH:}$PWD"
}

# Run a command in that environment, on this node.
inside() {
  local before=()
  inside_words
  (use_code && "${before[@]}" "$@")
}

# The same instead of this shell: signals for a command in the background are its own.
inside_exec() {
  local before=()
  inside_words
  use_code
  exec "${before[@]}" "$@"
}

# Sets `before`.
inside_words() {
  # Outside of a job there is no container: the dry run takes what Python it finds.
  [ -z "${SLURM_JOB_ID:-}" ] || mapfile -t before < <(container)
  if [ ${#before[@]} -gt 0 ]; then
    # A late USR1 for the training processes reaches all steps of the job.
    before=(srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" --quiet --export=ALL "${before[@]}"
      bash -c 'trap "" USR1; exec "$@"' -)
  else
    mapfile -t before < <(wrapper)
  fi
}

scratch() { echo "${QSPARSE_SCRATCH:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}"; }
