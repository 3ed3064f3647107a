"""``bloom report``: the curves of a run and a summary, as one PNG and one HTML page."""

from collections.abc import Sequence
from pathlib import Path

from megatron.commands.arguments import (
    CommandParser,
    add_overwrite,
    add_run,
    check_output,
    run_of,
)

_WRITTEN = ("report.png", "report.html")


def main(argv: Sequence[str]) -> int:
    """Write the report that the command line asks for; return the exit code."""
    args = _build_parser().parse(argv)
    run = _folder_of_run(run_of(args))
    folder = run if args.output is None else args.output
    check_output(args, "--output", [folder / name for name in _WRITTEN])
    from megatron.report.curves import load_run, write_report

    for path in write_report(load_run(run), folder):
        print(path)
    return 0


def _folder_of_run(named: Path) -> Path:
    """The folder of the run itself, also where one of its saves is named."""
    is_save = named.name.startswith("step-") and named.parent.name == "checkpoints"
    return named.parents[1] if is_save else named


def _build_parser() -> CommandParser:
    parser = CommandParser(
        "report",
        "Draw the curves of a run, and write them with a summary as a PNG and an HTML page.",
        ["bloom report runs/mine", "bloom report runs/mine --output pages/mine"],
    )
    add_run(parser)
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where to write (default: the run's folder)"
    )
    add_overwrite(parser)
    return parser
