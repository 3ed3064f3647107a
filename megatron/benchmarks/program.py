"""What the benchmark programs share: their options, and the way from there to published tables."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch

from megatron.benchmarks.measure import Times, check_quiet
from megatron.benchmarks.ranks import Device, run_alone
from megatron.benchmarks.result import Result, describe_environment, publish
from megatron.report.tables import Table

T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """What the command line asks for.

    Attributes:
        quick: tiny sizes, to try the program.
        noisy: times that vary are accepted.
    """

    device: Device
    quick: bool
    noisy: bool

    def choose(self, *, quick: T, cpu: T, cuda: T) -> T:
        """What fits the run."""
        if self.quick:
            return quick
        return cuda if self.device == "cuda" else cpu

    def alone(self, body: Callable[..., Any], *args: Any) -> Any:
        """``body(launch, *args)``, of a module, in a process of its own on the device."""
        return run_alone(body, *args, device=self.device)

    def timed(self, what: str, body: Callable[..., Any], *args: Any) -> dict[str, Times]:
        """``alone`` for a ``body`` that returns times, which must not vary too much.

        Raises:
            NoisyError: if they do.
        """
        times: dict[str, Times] = self.alone(body, *args)
        self.check(what, times)
        return times

    def check(self, what: str, times: dict[str, Times]) -> None:
        """Refuse times that vary, unless the run accepts them."""
        check_quiet(what, times, allow_noise=self.noisy or self.quick)


Tables: TypeAlias = Callable[[Run], Iterable[Table]]
"""Measures, and makes the tables of a benchmark."""


def run_benchmark(
    name: str, description: str, tables: Tables, argv: Sequence[str] | None, *, timed: bool = True
) -> int:
    """Run the command line ``argv`` of the benchmark ``name``; return the exit code.

    Args:
        timed: times are measured, on a device that can be chosen; else there is no such option.
    """
    parser = build_parser(description)
    if timed:
        _add_timing_options(parser)
    args = parser.parse_args(argv)
    run = Run(args.device, args.quick, args.noisy) if timed else Run("cpu", args.quick, False)
    publish(Result(name, describe_environment(run.device), list(tables(run))), args.json)
    return 0


def build_parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to try the program; figures mean nothing"
    )
    return parser


def _add_timing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--noisy", action="store_true", help="accept times that vary with other work"
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: a GPU if there is one",
    )
