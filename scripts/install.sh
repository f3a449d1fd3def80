#!/usr/bin/env bash
# Make .venv and install metier with its pinned dependencies. Called by the Makefile; safe to run again.
#
# torch comes first and on its own: on Linux the plain `torch` of the package index pulls gigabytes of CUDA, which a
# machine without an NVIDIA GPU has no use for. There the CPU build is looked for in pip's own configuration
# (a find-links folder, say), then on PyTorch's index of CPU builds; if neither answers, the plain one is taken.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV="${VENV:-.venv}"
TORCH_PIN="$(grep -E '^torch==' constraints.txt)"
CPU_INDEX="https://download.pytorch.org/whl/cpu"

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

find_python() {
    local candidate candidates="${PYTHON:-python3 python3.13 python3.12 python3.11}"
    for candidate in $candidates; do
        if fits "$candidate"; then echo "$candidate"; return; fi
    done
    fail "metier needs Python 3.11, 3.12 or 3.13; none of these is one: $candidates." \
        "Install one (Debian, Ubuntu: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3.12"
}

make_venv() {
    local python
    python="$(find_python)"
    # Debian and Ubuntu ship Python without ensurepip; `python -m venv` then leaves half a folder behind.
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot create virtual environments. On Debian or Ubuntu: apt install python3-venv"
    "$python" -m venv "$VENV"
}

# One try, soon given up, so that an index that does not answer costs seconds; the dependencies follow later.
try_torch() { "$VENV/bin/pip" install -qq --no-deps --retries 0 --timeout 10 "$@" 2>/dev/null; }

install_torch() {
    local installed="import importlib.metadata as m; print('torch==' + m.version('torch').split('+')[0])"
    if [ "$("$VENV/bin/python" -c "$installed" 2>/dev/null)" = "$TORCH_PIN" ]; then return; fi
    if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
        echo "Installing the CPU build of $TORCH_PIN ..."
        try_torch "$TORCH_PIN+cpu" && return
        try_torch --index-url "$CPU_INDEX" "$TORCH_PIN+cpu" && return
        echo "No CPU build of torch could be had from $CPU_INDEX; taking the default build, which may be large."
    fi
    "$VENV/bin/pip" install -qq --constraint constraints.txt "$TORCH_PIN"
}

[ -x "$VENV/bin/pip" ] || make_venv
install_torch
echo "Installing metier and its dependencies ..."
"$VENV/bin/pip" install -qq --constraint constraints.txt --editable ".[dev]"
