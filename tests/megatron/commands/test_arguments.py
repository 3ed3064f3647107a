"""How the verbs of ``bloom`` take their options, name runs and keep what is there."""

from pathlib import Path

import pytest

from megatron.commands.arguments import (
    CommandParser,
    add_overwrite,
    add_run,
    check_output,
    run_of,
)
from megatron.errors import ConfigError


def make_parser() -> CommandParser:
    parser = CommandParser("try", "Try things.", ["bloom try here"])
    parser.add_argument("--top_k", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("flags", nargs="*")
    return parser


def message(parser: CommandParser, *argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parser.parse(argv)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("word", ["--top_k", "--top-k"])
def test_hyphens_and_underscores_are_the_same(word: str) -> None:
    assert make_parser().parse([word, "3"]).top_k == 3
    assert make_parser().parse([f"{word}=3"]).top_k == 3


def test_what_follows_two_hyphens_is_as_it_was_written() -> None:
    assert make_parser().parse(["--", "--top-k", "3"]).flags == ["--top-k", "3"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--topk", "3"), "bloom try: --topk is not an option; did you mean --top_k?"),
        (("--top", "3"), "bloom try: --top is not an option; did you mean --top_k?"),
        (("--qqqqqq",), "bloom try: --qqqqqq is not an option; --help"),
        (("--seed", "x"), "bloom try: argument --seed: invalid int value: 'x'; --help tells more"),
    ],
)
def test_what_is_wrong_is_told_with_what_may_be_meant(argv: tuple[str, ...], said: str) -> None:
    assert message(make_parser(), *argv).startswith(said)


def test_help_has_what_it_does_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        make_parser().parse(["--help"])
    out = capsys.readouterr().out
    assert "Try things." in out
    assert "examples:\n  bloom try here\n" in out


def with_run() -> CommandParser:
    parser = CommandParser("try", "Try things.", [])
    add_run(parser)
    add_overwrite(parser)
    return parser


@pytest.mark.parametrize("argv", [["runs/a"], ["--checkpoint", "runs/a"], ["--checkpoint=runs/a"]])
def test_a_run_is_named_first_or_as_it_was(argv: list[str]) -> None:
    assert run_of(with_run().parse(argv)) == Path("runs/a")


def test_one_run_has_to_be_named() -> None:
    assert "RUN --checkpoint is required" in message(with_run())
    assert "not allowed with argument" in message(with_run(), "a", "--checkpoint", "b")
    assert message(with_run(), "a", "b").startswith("bloom try: b is one argument too many")


def test_output_takes_the_place_of_nothing_unasked(tmp_path: Path) -> None:
    there = tmp_path / "there"
    args = with_run().parse(["a"])
    check_output(args, "--output", [there])
    there.symlink_to(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="--output: .*there exists already; .*--overwrite"):
        check_output(args, "--output", [tmp_path / "other", there])
    check_output(with_run().parse(["a", "--overwrite"]), "--output", [there])
