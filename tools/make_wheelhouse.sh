#!/usr/bin/env bash
# Collects wheels in the folder $1: for a new environment or, with FOR=current, what the active one (or that of $PYTHON) lacks.
set -euo pipefail
. tools/check_python.sh
case ${FOR:-} in
  current) exec bash tools/install_into_current.sh --wheelhouse "$1" ;;
  "") ;;
  *) fail "FOR=$FOR: \`current\` is the only value, for the active environment" ;;
esac
check_python "$PYTHON"
"$PYTHON" -c 'import ensurepip, venv, pip' 2>/dev/null ||
  fail "$PYTHON lacks pip, ensurepip or venv: install your distribution's packages for them (Debian and Ubuntu: python3-venv, python3-pip)"
exec "$PYTHON" -m tools.wheelhouse make "$1" --torch-index "${TORCH_INDEX:-}"
