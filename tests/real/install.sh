#!/bin/sh
# Installs the real embeddings server into .venv-real; done already, it does nothing.
# About two minutes and 1.5 GB. PYTHON names the interpreter, 3.11 or newer.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
venv=$(cd "$here/../.." && pwd)/.venv-real
wanted=$here/requirements.txt
installed=$venv/installed-requirements.txt # a copy of what is in there, written last

if cmp -s "$wanted" "$installed"; then
    exit 0
fi
echo "installing the real embeddings server into .venv-real (about two minutes, 1.5 GB)"
"${PYTHON:-python3}" -m venv --clear "$venv"
"$venv/bin/python" -m pip install -qq --no-input -r "$wanted"
cp "$wanted" "$installed"
