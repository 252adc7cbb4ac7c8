#!/usr/bin/env bash
# Creates (or brings up to date) the virtual environment named by $1. Says in one line what is missing.
set -euo pipefail
. tools/check_python.sh
venv=$1
python=${PYTHON:-python3}

check_python "$python"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$python lacks ensurepip or venv: install your distribution's package for it (Debian and Ubuntu: python3-venv)"

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  # The default build of torch brings several GB of CUDA packages.
  needed_mib=$([ -n "${TORCH_INDEX:-}" ] && echo 3000 || echo 4000)
  mkdir -p "$venv"
  free_mib=$(df -Pm "$venv" | awk 'NR == 2 {print $4}')
  [ "$free_mib" -ge "$needed_mib" ] || fail "$free_mib MiB free in $venv, $needed_mib are needed (12 GB with a CUDA build of torch): free some space"
  echo "creating $venv with $("$python" -V)"
  "$python" -m venv --clear "$venv"
fi

offline=()
if [ -n "${OFFLINE:-}" ]; then
  "$venv/bin/python" -m tools.wheelhouse check "$OFFLINE" || exit 1
  offline=(--no-index --find-links "$OFFLINE")
  # Nor what pip's configuration adds.
  unset PIP_FIND_LINKS PIP_INDEX_URL PIP_EXTRA_INDEX_URL
  export PIP_CONFIG_FILE=/dev/null
fi

# One line that counts, instead of some hundred; errors go to stderr and are shown.
pip() {
  # -I: neither PYTHONPATH nor metadata beside the sources, left by an earlier installation, are of this environment.
  "$venv/bin/python" -I -m pip install --disable-pip-version-check --no-compile -c constraints.txt "${offline[@]}" "$@" |
    awk '/^Collecting|^Processing|^Downloading|^Installing/ {printf "  %3d  %.60s\n", ++n, $0; fflush()}'
}

started=$SECONDS
echo "installing dependencies (about 2 GB on disk; a few minutes)"
# torch first: what depends on it would otherwise pull the newest build.
pip ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)"
pip -e .
# pip would compile on one core. Some packages ship templates that are not Python: what does not compile is of no consequence.
"$venv/bin/python" -m compileall -q -j 0 "$venv"/lib/python3.*/site-packages >/dev/null || true
echo "installed in $((SECONDS - started)) s"
