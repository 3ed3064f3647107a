#!/usr/bin/env bash
# One machine or several by the deepspeed launcher (pip install -e .[deepspeed]). It is independent of how
# the run trains: it starts plain ranks as well as those of DeepSpeed's engine.
#
#   RANKS=8 bash examples/launch/deepspeed.sh --config run.yaml [--section.key value ...]
#
# Several machines, from the first of them, which logs in to the others by pdsh and ssh:
#
#   HOSTFILE=examples/launch/hostfile bash examples/launch/deepspeed.sh --config run.yaml
#
# The same without ssh: on each machine, with its place in the hostfile as NODE_RANK:
#
#   HOSTFILE=examples/launch/hostfile NODE_RANK=0 MASTER_ADDR=node1 \
#       bash examples/launch/deepspeed.sh --config run.yaml
#
# Run it from the root of the repository. The arguments are those of pretrain_bloom.py.
#
#   RANKS        processes on each machine (default 2, or what the hostfile says)
#   HOSTFILE     the machines, one a line; this one alone if it is not set
#   NODE_RANK    which of them this is, from 0, where there is no ssh
#   MASTER_ADDR  name or address of the first, as the others reach it (default: found by ssh)
#   MASTER_PORT  a free port there (default 29500)
set -euo pipefail

options=(--master_port "${MASTER_PORT:-29500}")
if [ -z "${HOSTFILE:-}" ]; then
    options+=(--num_gpus "${RANKS:-2}")
else
    options+=(--hostfile "$HOSTFILE" ${RANKS:+--num_gpus "$RANKS"})
    options+=(${MASTER_ADDR:+--master_addr "$MASTER_ADDR"})
    options+=(${NODE_RANK:+--no_ssh --node_rank "$NODE_RANK"})
fi
exec deepspeed "${options[@]}" pretrain_bloom.py "$@"
