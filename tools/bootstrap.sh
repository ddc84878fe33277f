#!/bin/sh
# Makes the virtual environment that the Makefile works in: bootstrap.sh DIRECTORY
# Finds Python 3.12 or newer on PATH, in pyenv, or through uv. Set PYTHON=/path/to/python to choose.
set -eu
venv=$1
cd "$(dirname "$0")/.."

fits() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

python=
for candidate in ${PYTHON:-} python3.12 python3.13 python3.14 python3 "$HOME"/.pyenv/versions/3.1[2-9]*/bin/python; do
    if fits "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -n "${PYTHON:-}" ] && [ "$python" != "$PYTHON" ]; then
    echo "error: PYTHON=$PYTHON is not Python 3.12 or newer with venv" >&2
    exit 1
fi

if [ ! -x "$venv/bin/python" ] || ! fits "$venv/bin/python"; then
    rm -rf "$venv"
    if [ -n "$python" ]; then
        "$python" -m venv "$venv"
    elif command -v uv >/dev/null 2>&1; then
        uv venv --quiet --seed --python 3.12 "$venv"
    else
        echo "error: no Python 3.12 or newer: install one (apt install python3.12 python3.12-venv, pyenv install 3.12, or uv)" >&2
        exit 1
    fi
fi

set -- -c constraints.txt -e '.[all,dev]'
if [ -f serve/client/pyproject.toml ]; then
    set -- "$@" -e serve/client -e serve/lerobot
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
echo "$venv is ready: $("$venv/bin/python" --version), $("$venv/bin/mmseq" --version)"
