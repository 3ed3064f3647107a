#!/usr/bin/env bash
# One process: a laptop's CPU, or one GPU.
#
#   bash examples/launch/single.sh --config run.yaml [--section.key value ...]
#
# Run it from the root of the repository. The arguments are those of pretrain_bloom.py. To try a
# launcher, take what examples/quickstart.sh leaves behind:
#
#   bash examples/launch/single.sh --config runs/quickstart/run/config.yaml --folder runs/single
set -euo pipefail

# exec hands the exit code of the run on; docs/launching.md lists what it says.
exec python pretrain_bloom.py "$@"
