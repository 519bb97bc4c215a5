#!/usr/bin/env bash
# Makes .venv with what the tests need, then lints and tests, two tests at a time. Arguments are pytest's:
#   bash launch/test.sh -k launcher
#   bash launch/test.sh -n 0 --pdb
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/environment.sh"

# Tests start processes by the hundred: without its bytecode each would compile genscale anew, for a second or two.
unset PYTHONDONTWRITEBYTECODE
prepare_environment "[test]"
cd "$root"
say "ruff check"
"$venv/bin/python" -m ruff check . || die "ruff found something to mend (see above)"
say "pytest $*"
exec "$venv/bin/python" -m pytest -n 2 --dist worksteal "$@"
