"""Pretrain a BLOOM-style language model.

python pretrain_bloom.py --config run.yaml [--section.key value ...]
torchrun --nproc_per_node 2 pretrain_bloom.py --config run.yaml --parallel.tensor 2
python pretrain_bloom.py --config run.yaml --dry_run 80

Other launchers are in docs/launching.md.
"""

import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron.config import Config, load_config
from megatron.errors import PeerError, RunError, StoppedOnRequestError
from megatron.launch import leave, let_cause_be_seen, read_environment, take_local_rank
from megatron.log import setup_logging
from megatron.training.dry_run import dry_run
from megatron.training.dry_run_report import DryRunRequest, dry_run_report, take_request
from megatron.training.trainer import Trainer

logger = logging.getLogger("megatron")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Train, and leave the process with one of the exit codes of ``megatron.errors``.

    After an error it leaves at once: an ordinary exit would wait for threads that wait for lost
    peers, while the peers wait for this rank.
    """
    setup_logging(rank=0)
    speaks_for_all = True
    try:
        speaks_for_all = read_environment().rank == 0
        request, options = take_request(take_local_rank(sys.argv[1:] if argv is None else argv))
        config = load_config(options)
        if request is None:
            Trainer(config).train()
        elif speaks_for_all:
            _count(config, request)
    except RunError as error:
        if speaks_for_all or not error.on_every_rank:
            asked_for = isinstance(error, StoppedOnRequestError)
            logger.log(logging.INFO if asked_for else logging.ERROR, "%s", error)
        if isinstance(error, PeerError):
            let_cause_be_seen()
        leave(error.exit_code)
    except Exception:
        # A bug, which keeps its traceback.
        sys.excepthook(*sys.exc_info())
        leave(RunError.exit_code)
    sys.exit(0)


def _count(config: Config, request: DryRunRequest) -> None:
    found = dry_run(config)
    sys.stdout.write(dry_run_report(found, request.memory))
    if request.memory is not None:
        found.check_fits(request.memory)


if __name__ == "__main__":
    main()
