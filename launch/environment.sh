# Sourced by quickstart.sh and test.sh: `prepare_environment "[test]"` makes the virtual environment, or reuses a complete one.
# GENSCALE_VENV names another place than .venv, PYTHON another interpreter than the first of these that is new enough.
pythons="python3.11 python3 python3.12 python3.13"

say() { printf '==> %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

find_python() {
    local name
    for name in ${PYTHON:-$pythons}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    return 1
}

# install WHAT pip-arguments...: quiet, but for one line when it fails.
install() {
    local what=$1
    shift
    say "installing $what"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@" >>"$venv/install.log" 2>&1 ||
        die "pip could not install $what; its last words: $(grep . "$venv/install.log" | tail -n 1) (all of them: $venv/install.log)"
}

prepare_environment() {
    local extras=$1 python stamp
    venv=${GENSCALE_VENV:-$root/.venv}
    # Complete means: the last installation with these extras, from these very files, came to its end.
    stamp="$extras $(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
    if [ -f "$venv/installed" ] && grep -qxF "$stamp" "$venv/installed"; then
        say "using the environment in $venv"
        return
    fi
    python=$(find_python) || die "Python 3.11 or newer is needed (looked for: ${PYTHON:-$pythons}); set PYTHON to it"
    if ! [ -x "$venv/bin/python" ]; then
        say "making a virtual environment in $venv"
        "$python" -m venv "$venv" || die "$python -m venv $venv failed (on Debian and Ubuntu: apt install python3-venv)"
    fi
    # torch comes first and alone: the pinned version as this machine's package index builds it, with CUDA or without.
    install "torch (the largest part)" "$(grep '^torch==' "$root/constraints.txt")"
    install "genscale and what it needs" -c "$root/constraints.txt" -e "$root$extras"
    echo "$stamp" >>"$venv/installed"
}
