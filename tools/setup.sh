#!/usr/bin/env bash
# Build the environment of a checkout: uv first, then everything with the pinned versions of constraints.txt.
# Where there is no NVIDIA GPU, torch comes as the CPU build that pip's find-links or the CPU index offer.
set -euo pipefail
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fastsd needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 1; }
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check uv
# uv does not read pip's settings: hand it what pip would look at (a folder of wheels, a mirror).
# (The environment counts like the files: `pip config get` shows only the latter, as "global.find-links".)
links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$("$VENV/bin/python" -m pip config get global.find-links 2>/dev/null || true)}}
index=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-$("$VENV/bin/python" -m pip config get global.index-url 2>/dev/null || true)}}
[ -z "$links" ] || export UV_FIND_LINKS="$links"
[ -z "$index" ] || export UV_DEFAULT_INDEX="$index"
torch=()
if ! command -v nvidia-smi >/dev/null 2>&1 && [ -z "$links" ]; then
    torch=(--index https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
fi
export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}
"$VENV/bin/uv" pip install --quiet --compile-bytecode --python "$VENV/bin/python" --constraints constraints.txt "${torch[@]}" --editable ".[all]" --group dev
"$VENV/bin/fastsd" doctor || true
