#!/usr/bin/env bash
# Several processes on one machine, one for each GPU, by torchrun, which comes with torch.
#
#   RANKS=8 bash examples/launch/torchrun.sh --config run.yaml [--section.key value ...]
#
# Run it from the root of the repository. The arguments are those of pretrain_bloom.py.
#
#   RANKS            processes (default 2); without GPUs they share the cores
#   OMP_NUM_THREADS  threads of each of them (torchrun's default is 1)
set -euo pipefail

# --standalone lets torchrun choose a free port, so that several runs fit on one machine.
exec torchrun --standalone --nproc_per_node "${RANKS:-2}" pretrain_bloom.py "$@"
