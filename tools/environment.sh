# Sourced by examples/quickstart.sh, tests/run.sh and tests/lowest.sh: a Python that fits, and an
# environment made with it. What does not fit is told in one line, before anything is made.

# The Pythons that the pinned torch has wheels for; tests/test_installation.py asks the index.
oldest_minor=11
newest_minor=14

refuse() {
    echo "error: $*" >&2
    exit 2
}

python_version() { # PYTHON; prints nothing if it is none, or does not start
    local version
    version=$("$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null </dev/null) \
        && [[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] && echo "$version" || true
}

check_version() { # VERSION SUBJECT REMEDY
    local major minor
    IFS=. read -r major minor _ <<<"$1"
    if ((major < 3 || (major == 3 && minor < oldest_minor))); then
        refuse "Python 3.$oldest_minor or newer is needed, but $2 $1; $3"
    fi
    if ((major > 3 || minor > newest_minor)); then
        refuse "Python 3.$newest_minor or older is needed, as torch has no wheel for a newer one," \
            "but $2 $1; $3"
    fi
}

check_python() { # PYTHON
    local version
    if ! command -v "$1" >/dev/null; then
        refuse "Python 3.$oldest_minor or newer is needed, but there is no $1; name one by PYTHON=..."
    fi
    version=$(python_version "$1")
    if [ -z "$version" ]; then
        refuse "Python 3.$oldest_minor or newer is needed, but $1 does not start as one;" \
            "name another by PYTHON=..."
    fi
    check_version "$version" "$1 is" "name another by PYTHON=..."
}

# Whether an environment is whole. Without its pyvenv.cfg its python would be, and install into, the
# one that made it.
check_environment() { # FOLDER
    local version again="remove it (rm -r $1)"
    version=$(python_version "$1/bin/python")
    if [ -n "$version" ]; then
        check_version "$version" "$1 was made by Python" "$again and name another by PYTHON=..."
    fi
    if [ -z "$version" ] || ! "$1/bin/python" - "$1" <<<'
import os, sys
sys.exit(os.path.realpath(sys.prefix) != os.path.realpath(sys.argv[1]))' 2>/dev/null \
        || ! "$1/bin/python" -m pip --version >/dev/null 2>&1 </dev/null; then
        refuse "the environment $1 is broken, or was never finished; $again and start again"
    fi
    if [ -n "${PYTHON:-}" ]; then
        check_python "$PYTHON"
        local named
        named=$(python_version "$PYTHON")
        if [ "${named%.*}" != "${version%.*}" ]; then
            refuse "PYTHON=$PYTHON is $named, but $1 was made by Python $version;" \
                "$again, or leave PYTHON out"
        fi
    fi
}

# Make an environment, or take the one that is there.
ensure_environment() { # FOLDER
    local python=${PYTHON:-python3}
    if [ -e "$1" ] || [ -L "$1" ]; then
        check_environment "$1"
        return
    fi
    check_python "$python"
    if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 </dev/null; then
        refuse "$python cannot make an environment without its modules venv and ensurepip" \
            "(Debian, Ubuntu: apt-get install python3-venv); or name another by PYTHON=..."
    fi
    if ! "$python" -m venv "$1"; then
        rm -rf "$1"
        refuse "$python could not make the environment $1"
    fi
}
