#!/usr/bin/env bash
# Make an environment in .venv, then check format, lint and types and run all CPU tests.
#
#   bash tests/run.sh [pytest arguments]
#
# PYTHON names the Python that makes the environment (default python3).
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh

ensure_environment .venv
python=.venv/bin/python
"$python" -m pip install --quiet -c constraints.txt -e ".[dev]"

"$python" -m ruff format --check .
"$python" -m ruff check .
"$python" -m mypy
# One thread a process: two workers and the ranks that they start share the cores anyway.
OMP_NUM_THREADS=1 "$python" -m pytest --numprocesses 2 "$@"
