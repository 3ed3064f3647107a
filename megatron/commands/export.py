"""``bloom export``: write a save as a BLOOM model that transformers opens."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron.commands.arguments import (
    CommandParser,
    add_overwrite,
    add_run,
    check_output,
    run_of,
)

_TOLERANCE = 1e-5


def main(argv: Sequence[str]) -> int:
    """Write the export that the command line asks for; return the exit code."""
    args = _build_parser().parse(argv)
    check_output(args, "--output", [args.output])
    from megatron.checkpoint.load import open_checkpoint
    from megatron.config import dtype_named
    from megatron.inference.load import find_checkpoint

    reader = open_checkpoint(find_checkpoint(run_of(args)))
    with _others_silent():
        from transformers.utils.logging import disable_progress_bar

        from megatron.inference.export import export

        disable_progress_bar()
        difference = export(
            reader, args.output, dtype_named(args.dtype), args.tolerance, overwrite=args.overwrite
        )
    print(f"wrote {args.output}; its logits differ from the checkpoint's by {difference:.2e}")
    return 0


@contextmanager
def _others_silent() -> Iterator[None]:
    """Without what transformers and its imports say of packages that are not needed here."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _build_parser() -> CommandParser:
    parser = CommandParser(
        "export",
        "Write a save as a BLOOM model that transformers opens. The export is opened again, and "
        "its logits\nare compared with those of the save; only if they agree does it appear.",
        [
            "bloom export runs/mine --output mine-hf",
            "bloom export runs/mine --output hf --dtype bf16",
        ],
    )
    add_run(parser)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights (default: fp32)"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=_TOLERANCE,
        help=f"greatest difference of logits, as a part of the largest (default: {_TOLERANCE})",
    )
    add_overwrite(parser)
    return parser
