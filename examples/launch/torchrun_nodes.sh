#!/usr/bin/env bash
# Several machines by torchrun: the same command on each of them, but for NODE_RANK.
#
#   node1$ NODES=2 NODE_RANK=0 MASTER_ADDR=node1 RANKS=8 bash examples/launch/torchrun_nodes.sh \
#              --config run.yaml
#   node2$ NODES=2 NODE_RANK=1 MASTER_ADDR=node1 RANKS=8 bash examples/launch/torchrun_nodes.sh \
#              --config run.yaml
#
# Run it from the root of the repository. The arguments are those of pretrain_bloom.py. Program and
# data have to be on every machine under the same paths, and the run folder on a disk they share.
#
#   NODES        machines
#   NODE_RANK    which of them this is, from 0
#   MASTER_ADDR  name or address of machine 0, as the others reach it
#   MASTER_PORT  a free port there (default 29500)
#   RANKS        processes on each machine (default 2)
set -euo pipefail

exec torchrun \
    --nnodes "${NODES:?how many machines}" \
    --node_rank "${NODE_RANK:?which of the machines this is, from 0}" \
    --nproc_per_node "${RANKS:-2}" \
    --master_addr "${MASTER_ADDR:?name of machine 0}" \
    --master_port "${MASTER_PORT:-29500}" \
    pretrain_bloom.py "$@"
