# Sourced by the commands in tools/: makes .venv in the project's root and installs daggc in it, once.
# Python >= 3.11 is found as $PYTHON, or as the newest python3.x on the path that is new enough.

set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "daggc needs Python 3.11 to 3.13; none was found (set PYTHON to one)" >&2
  return 1
}

# use_env [EXTRAS]: activate .venv with the project and these extras, installing what has changed.
use_env() {
  local extras="${1:-}"
  local stamp=".venv/installed-${extras:-base}"
  if [ ! -x .venv/bin/python ]; then
    echo "making an environment in .venv" >&2
    "$(find_python)" -m venv .venv
  fi
  if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ tools/constraints.txt -nt "$stamp" ]; then
    echo "installing daggc and what it needs (about two minutes, once)" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt -e ".${extras:+[$extras]}"
    touch "$stamp"
  fi
  export PATH="$root/.venv/bin:$PATH"
}
