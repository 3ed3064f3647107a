"""How a program ends: an error of ours is one message and its exit code.

Of several ranks one speaks, whichever comes first; see ``megatron.spokesman``.
"""

import logging
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from megatron.errors import LatePeerError, PeerError, RunError
from megatron.spokesman import Spokesman

_NOTICE_SECONDS = 1.5
"""Within which a launcher notices that a process has ended; deepspeed looks once a second."""
_INTERRUPTED = 130


def run_program(
    main: Callable[[], int],
    say: Callable[[RunError], None],
    spokesman: Spokesman,
    end: Callable[[int], NoReturn] | None = None,
) -> NoReturn:
    """Leave the process with what ``main`` returns, or with the exit code of its error.

    After an error it leaves at once: an ordinary exit would wait for threads that wait for lost
    peers, while the peers wait for this rank.

    Args:
        say: tells the user of an error that ends the program.
        end: how the process leaves after an error; None is ``leave``.
    """
    end = end or leave
    try:
        exit_code = main()
    except RunError as error:
        if isinstance(error, PeerError) and not isinstance(error, LatePeerError):
            let_cause_be_seen()
        spokesman.say(partial(say, error))
        end(error.exit_code)
    except KeyboardInterrupt:
        spokesman.say(lambda: say(RunError("interrupted; what was not saved is lost")))
        end(_INTERRUPTED)
    except Exception:
        # A bug, which keeps its traceback.
        spokesman.say(partial(sys.excepthook, *sys.exc_info()))
        end(RunError.exit_code)
    sys.exit(exit_code)


def run_tool(main: Callable[[], int]) -> NoReturn:
    """Run the ``main`` of a command-line tool.

    One that is alone leaves in the ordinary way, in which its own processes are ended too.
    """
    spokesman = Spokesman.of_process()
    run_program(main, _say_in_a_line, spokesman, sys.exit if spokesman.is_alone else leave)


def _say_in_a_line(error: RunError) -> None:
    sys.stderr.write(f"error: {error}\n")
    sys.stderr.flush()


def let_cause_be_seen() -> None:
    """Wait a moment in a rank that lost another, before it leaves.

    A launcher ends all ranks when it sees the first that failed, and some give back its exit code.
    That must be the one that failed by itself, not one that failed in consequence. And if the other
    says why, this one has nothing to add.
    """
    time.sleep(_NOTICE_SECONDS)


def leave(exit_code: int) -> NoReturn:
    """End this process at once, without waiting for threads that wait for lost peers."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
