"""Pretrain a BLOOM-style language model.

python pretrain_bloom.py --config run.yaml [--section.key value ...]
torchrun --nproc_per_node 2 pretrain_bloom.py --config run.yaml --parallel.tensor 2
"""

import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron.config import load_config
from megatron.errors import RunError, StoppedOnRequestError
from megatron.launch import leave, read_environment
from megatron.log import setup_logging
from megatron.training.trainer import Trainer

logger = logging.getLogger("megatron")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Train, and leave the process with one of the exit codes of ``megatron.errors``."""
    setup_logging(rank=0)
    speaks_for_all = True
    try:
        speaks_for_all = read_environment().rank == 0
        Trainer(load_config(sys.argv[1:] if argv is None else argv)).train()
    except RunError as error:
        if speaks_for_all or not error.on_every_rank:
            asked_for = isinstance(error, StoppedOnRequestError)
            logger.log(logging.INFO if asked_for else logging.ERROR, "%s", error)
        # An ordinary exit would wait for threads that wait for lost peers.
        leave(error.exit_code)
    sys.exit(0)


if __name__ == "__main__":
    main()
