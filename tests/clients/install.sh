#!/bin/sh
# Install what the client tests need: .venv-clients/ for Python, node_modules/ beside this file for Node.
# Run it from any folder, as often as you like: what is already installed from the same lists is left alone.
#
#   sh tests/clients/install.sh && .venv-clients/bin/python -m pytest tests/clients
set -eu

cd "$(dirname "$0")"
venv=../../.venv-clients
python=${PYTHON:-python3}

fail() {
    echo "tests/clients/install.sh: $1" >&2
    exit 1
}

for tool in node npm; do
    command -v "$tool" >/dev/null || fail "'$tool' is missing; on Debian: apt-get install nodejs npm"
done
node -e 'process.exit(Number.parseInt(process.versions.node) >= 18 ? 0 : 1)' ||
    fail "node is $(node --version), it must be 18 or newer; on Debian: apt-get install nodejs npm"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "'$python' is missing or older than 3.11; on Debian: apt-get install python3 python3-venv"

# A folder is finished when its stamp, written last, holds the digest of all it was made from.
digest() {
    sha256sum | cut -d ' ' -f 1
}
python_made_from=$({ "$python" -VV; cat requirements.txt; } | digest)
node_made_from=$({ node --version; cat package.json package-lock.json; } | digest)

is_made_from() {
    [ -f "$1/.made-from" ] && [ "$(cat "$1/.made-from")" = "$2" ]
}

if ! is_made_from "$venv" "$python_made_from"; then
    "$python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check -r requirements.txt
    echo "$python_made_from" > "$venv/.made-from"
fi

if ! is_made_from node_modules "$node_made_from"; then
    # Only errors are shown: openai's manifest asks for Node 22 and npm warns below it, but embeddings run on 18.
    npm ci --loglevel=error
    echo "$node_made_from" > node_modules/.made-from
fi
