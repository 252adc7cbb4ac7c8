#!/usr/bin/env bash
# Says where the virtual environment $1 is there already and is not what was asked for: the interpreter $2, torch's index $3.
set -euo pipefail
. tools/check_python.sh
venv=$1 python=$2 index=$3
[ -x "$venv/bin/python" ] || exit 0
version='import sys; print("{}.{}".format(*sys.version_info))'
if [ -n "$python" ]; then
  asked=$("$python" -c "$version" 2>/dev/null) || fail "PYTHON=$python does not run: correct it"
  here=$("$venv/bin/python" -c "$version")
  [ "$asked" = "$here" ] || fail "$venv is of Python $here, PYTHON=$python is $asked: remove $venv, or name another one with VENV=DIR"
fi
if [ -n "$index" ] && [ -s "$venv/.installed" ] && [ "$(cat "$venv/.installed")" != "$index" ]; then
  fail "$venv was installed with another index of torch: remove it, or name another one with VENV=DIR"
fi
