#!/usr/bin/env bash
# Make an environment in .venv, then check format, lint and types and run all CPU tests.
#
#   bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."

[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet -c constraints.txt -e ".[dev]"

.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
# One thread a process: two workers and the ranks that they start share the cores anyway.
OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses 2 "$@"
