#!/usr/bin/env bash
# Runs tools/prebuild.py for the environment that has the project: that of $PYTHON, else $1, else the active one. $2: folder for what is compiled.
set -euo pipefail
. tools/check_python.sh
if [ -n "${PYTHON:-}" ]; then python=$PYTHON
elif [ -x "$1/bin/python" ]; then python=$1/bin/python
else python=$(command -v python || echo python3); fi
check_python "$python"
for package in torch deepspeed megatron.core; do
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$package') is None)" 2>/dev/null ||
    fail "$python has no $package: \`make install\` makes an environment with all that is needed, \`make install-into-current\` adds what the active one lacks"
done
exec "$python" -m tools.prebuild --cache "$2"
