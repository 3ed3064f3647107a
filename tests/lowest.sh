#!/usr/bin/env bash
# Run the fast tests at the lowest versions that pyproject.toml declares.
#
#   bash tests/lowest.sh [pytest arguments]
#
# Their environment is made in .venv-lowest; it takes some GB, as the public torch brings CUDA.
# PYTHON names the Python that makes it (default python3).
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh

ensure_environment .venv-lowest
python=.venv-lowest/bin/python
"$python" -m pip install --quiet -c constraints.txt uv
# As a user gets them: wheels, but for DeepSpeed, which has none.
"$python" -m uv --no-config pip install --quiet --python "$python" --resolution lowest-direct \
    --only-binary :all: --no-binary deepspeed --no-binary bloom-pretrain -e ".[dev]"

OMP_NUM_THREADS=1 "$python" -m pytest --numprocesses 2 -m "not slow and not nightly" "$@"
