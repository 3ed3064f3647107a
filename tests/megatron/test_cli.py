"""How programs end: with the code of the error, and a message that one rank has said."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, sys, threading, time
from megatron.cli import run_tool
from megatron.errors import DataError, LatePeerError, PeerError

def main():
    MAIN
    return 3

run_tool(main)
"""


def start(main: str, **variables: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.replace("MAIN", main)
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path), **variables},
    )


@pytest.mark.parametrize(
    ("main", "exit_code", "said"),
    [
        ("pass", 3, ""),
        ("raise DataError('no text')", 3, "error: no text\n"),
        ("raise LatePeerError('late')", 8, "error: late\n"),
        ("raise KeyboardInterrupt", 130, "error: interrupted; what was not saved is lost\n"),
    ],
)
def test_tool_ends_with_a_code_and_a_message(main: str, exit_code: int, said: str) -> None:
    done = start(main)
    assert (done.returncode, done.stdout, done.stderr) == (exit_code, "", said)


def test_bug_keeps_its_traceback() -> None:
    done = start("raise ArithmeticError('a bug')")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ArithmeticError: a bug\n")


def test_rank_leaves_without_waiting_for_threads_and_a_lone_tool_ends_its_processes() -> None:
    waits = "threading.Thread(target=time.sleep, args=(2,)).start(); raise DataError('x')"
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node", "MASTER_PORT": "1"}
    ends = "import atexit; atexit.register(print, 'cleaned up'); " + waits
    assert start(ends).stdout == "cleaned up\n"
    assert start(ends, **ranks).stdout == ""
