"""``bloom report``: the curves of runs and a summary, as one PNG and one HTML page."""

from collections.abc import Sequence
from pathlib import Path

from megatron.commands.arguments import CommandParser, add_overwrite, check_output

_WRITTEN = ("report.png", "report.html")


def main(argv: Sequence[str]) -> int:
    """Write the report that the command line asks for; return the exit code."""
    parser = _build_parser()
    args = parser.parse(argv)
    runs = list(map(_folder_of_run, args.runs))
    folder = args.output or runs[0]
    if args.output is None and len(runs) > 1:
        parser.error("the report of several runs needs --output, the folder to write it to")
    check_output(args, "--output", [folder / name for name in _WRITTEN])
    from megatron.report.page import write_report
    from megatron.report.runs import load_runs

    for path in write_report(load_runs(runs), folder):
        print(path)
    return 0


def _folder_of_run(named: Path) -> Path:
    """The folder of the run itself, also where one of its saves is named."""
    is_save = named.name.startswith("step-") and named.parent.name == "checkpoints"
    return named.parents[1] if is_save else named


def _build_parser() -> CommandParser:
    parser = CommandParser(
        "report",
        "Draw the curves of runs, and write them with a summary as a PNG and an HTML page.",
        ["bloom report runs/mine", "bloom report runs/mine runs/other --output pages/both"],
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of one of its saves"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to write (default: the run's folder); several runs need it",
    )
    add_overwrite(parser)
    return parser
