#!/usr/bin/env bash
# Run all tests and benchmarks that need a GPU, each half in less than ten minutes.
#
#   bash tools/benchmarks/gpu.sh FOLDER         benchmarks, and tests of parts, on one GPU
#   bash tools/benchmarks/gpu.sh FOLDER runs    tests of engine and trainer, on all GPUs there are
#
# Takes the python of the PATH and installs nothing. FOLDER gets a JSON file of each benchmark and a
# log of each part; the files, put into docs/performance, become part of the performance page. A
# part that fails or takes too long does not stop the others; the exit code is the number of those.
set -uo pipefail
out=$(mkdir -p "${1:?usage: bash tools/benchmarks/gpu.sh FOLDER}" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/../.."
export PYTHONPATH=. OMP_NUM_THREADS=4
failed=0

# part NAME SECONDS COMMAND...
part() {
    local name=$1 seconds=$2 start=$SECONDS
    shift 2
    echo "== $name"
    if timeout "$seconds" "$@" 2>&1 | tee "$out/$name.log"; then
        echo "== $name: done in $((SECONDS - start)) s"
    else
        echo "== $name: FAILED after $((SECONDS - start)) s"
        failed=$((failed + 1))
    fi
}

# benchmark NAME SECONDS [OPTION...]
benchmark() {
    local name=$1 seconds=$2
    shift 2
    part "$name" "$seconds" python -m "megatron.benchmarks.$name" --json "$out/${name%_gpu}_gpu.json" "$@"
}

if [ "${2:-}" = runs ]; then
    part runs 590 python -m pytest tests/gpu/test_run.py -m gpu -q -p no:cacheprovider
    exit "$failed"
fi

benchmark train_step_gpu 220
benchmark gains 60 --device cuda
benchmark engines 50 --device cuda
benchmark attention 60 --device cuda
benchmark head 30 --device cuda
benchmark kernels 25 --device cuda
part tests 150 python -m pytest tests/gpu --ignore tests/gpu/test_run.py -m gpu -q \
    -p no:cacheprovider

echo "== $failed parts failed"
exit "$failed"
