"""``bloom train``, and ``pretrain_bloom.py``: pretrain a BLOOM-style language model.

    bloom train --config run.yaml [--section.option value ...]
    torchrun --nproc_per_node 2 --no_python bloom train --config run.yaml --parallel.tensor 2
    bloom train --config run.yaml --dry_run 80

Other launchers are in docs/launching.md.
"""

import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from typing import NoReturn

from megatron.cli import leave, run_program
from megatron.environment import read_environment, take_local_rank
from megatron.errors import RunError, StoppedOnRequestError
from megatron.log import setup_logging
from megatron.spokesman import Spokesman
from megatron.stopping import StopSignals

logger = logging.getLogger("megatron")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Train, and leave the process with one of the exit codes of ``megatron.errors``."""
    setup_logging(rank=0)
    spokesman = Spokesman.of_process()
    arguments = sys.argv[1:] if argv is None else argv

    def stop(error: StoppedOnRequestError) -> None:
        spokesman.say(partial(_say, error))
        leave(error.exit_code)

    def heed_signals() -> int:
        with StopSignals(stop) as signals:
            _run(arguments, signals, spokesman)
        return 0

    run_program(heed_signals, _say, spokesman)


def _underscored(word: str) -> str:
    return "--dry_run" + word[len("--dry-run") :] if word.startswith("--dry-run") else word


def _say(error: RunError) -> None:
    if isinstance(error, StoppedOnRequestError):
        # Other ranks than the first are heard with errors only.
        setup_logging(rank=0)
        logger.info("%s", error)
    else:
        logger.error("%s", error)


def _run(argv: Sequence[str], signals: StopSignals, spokesman: Spokesman) -> None:
    first = read_environment().rank == 0
    options = take_local_rank(argv)
    # What takes seconds to import is imported when signals are heeded already.
    from megatron.config import asks_for_help, load_config

    # What --help and --print_config write is the same on all ranks.
    with redirect_stdout(sys.stdout if first else StringIO()):
        if asks_for_help(options):
            load_config(options)
        from megatron.planning.report import answer, take_request

        request, options = take_request([_underscored(word) for word in options])
        config = load_config(options)
    if request is None:
        from megatron.training.trainer import Trainer

        Trainer(config).train(signals, spokesman)
    elif first:
        answer(config, request, sys.stdout.write)
