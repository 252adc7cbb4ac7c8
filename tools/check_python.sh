# Sourced: fail MESSAGE, and check_python INTERPRETER, which ends the script where it cannot run this project.
fail() { echo "error: $*" >&2; exit 1; }

check_python() {
  [ "$(uname -s)" = Linux ] || fail "Linux is needed (on Windows use WSL2, on macOS a Linux container), this is $(uname -s)"
  command -v "$1" >/dev/null || fail "no $1: install Python 3.11 or newer, or name one with PYTHON=/path/to/python3.11"
  "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' ||
    fail "$("$1" -V 2>&1) is not supported, Python 3.11 and 3.12 are: install one, or name it with PYTHON=/path/to/python3.11"
}
