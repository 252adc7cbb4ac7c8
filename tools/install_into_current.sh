#!/usr/bin/env bash
# Runs tools/install_into_current.py with the active interpreter, or with $PYTHON. Says in one line what is missing.
set -euo pipefail
. tools/check_python.sh
python=${PYTHON:-$(command -v python || echo python3)}
check_python "$python"
"$python" -c 'import pip' 2>/dev/null ||
  fail "$python has no pip: add it with \`$python -m ensurepip\` (in an environment made by uv: \`uv pip install pip\`)"
exec "$python" -m tools.install_into_current "$@"
