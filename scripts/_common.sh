# shellcheck shell=bash
# Functions for scripts/demo, scripts/test and scripts/image. This file is sourced, never run.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck disable=SC2034 # used by the scripts that source this
VENV="$ROOT/.venv"

# stage TEXT...: print the name of the next stage, with the seconds since the script's start.
stage() { printf '== [%4d s] %s\n' "$SECONDS" "$*"; }

# fail CODE TEXT...: print the problem and exit. Codes: 2 usage, 5 engine.
fail() {
    local code="$1"
    shift
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit "$code"
}

# has_engine: succeed if a Docker engine answers.
has_engine() {
    [ "${STARLING_NO_DOCKER:-}" != 1 ] && command -v docker >/dev/null && timeout 20 docker info >/dev/null 2>&1
}

# find_python: print the command of a Python that is new enough and can make virtual environments.
find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.11 python3.12 python3.13 python3.14 python; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    fail 2 "needs Python 3.11 or newer with its venv module (Debian: apt-get install python3-venv); PYTHON=/path names one"
}

# ensure_environment LEVEL: make .venv with the packages of launcher, trainer or dev (each includes the one before).
# Packages are installed again only if a requirements file or pyproject.toml has changed.
ensure_environment() {
    local level="$1" file stamp python packages digest
    case "$level" in
        launcher) file=requirements-launcher.txt ;;
        trainer) file=requirements.txt ;;
        dev) file=requirements-dev.txt ;;
        *) fail 2 "no such level of environment: $level" ;;
    esac
    digest="$(cat "$ROOT"/requirements*.txt "$ROOT/pyproject.toml" | sha256sum | cut -d ' ' -f 1)"
    for stamp in dev trainer launcher; do
        if [ "$(cat "$VENV/.starling-$stamp" 2>/dev/null)" = "$digest" ] && [ -x "$VENV/bin/launcher" ]; then
            return
        fi
        [ "$stamp" != "$level" ] || break
    done
    if [ ! -x "$VENV/bin/python" ]; then
        python="$(find_python)"
        stage "environment: $VENV with $("$python" --version)"
        "$python" -m venv "$VENV"
    fi
    stage "environment: installing $file"
    "$VENV/bin/python" -m pip install --disable-pip-version-check -qq --progress-bar off -r "$ROOT/$file"
    "$VENV/bin/python" -m pip install --disable-pip-version-check -qq --no-deps --editable "$ROOT" \
        --config-settings editable_mode=compat # a plain path: the default mode's finder delays every start by 10 ms
    # That mode adds one folder, but the packages are in two.
    packages="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    printf '%s\n' "$ROOT/app" >"$packages/starling-checkout.pth"
    echo "$digest" >"$VENV/.starling-$level"
}
