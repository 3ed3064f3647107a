"""Values of any small dataclass, and the words for what is wrong with them.

What the options of a run say is in tests/integration/wrong_configs.py.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from megatron.config.help import Guide
from megatron.config.parser import parse_config
from megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 3
    """How many."""
    kind: Literal["soft", "hard"] = "soft"


@dataclass(frozen=True, kw_only=True)
class Outer:
    """A thing."""

    folder: Path
    rate: float = 0.5
    shares: tuple[float, float] = (1, 2)
    weights: dict[str, float] = field(default_factory=dict)
    limit: int | None = None
    speed: int | Literal["auto"] = 1
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.rate == 13:
            raise ConfigError("rate must not be 13")


GUIDE = Guide(prog="thing.py", description="Do things.")


def parse(*argv: object) -> Outer:
    return parse_config(Outer, [str(a) for a in argv], GUIDE)


def message(*argv: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse("--folder", "here", *argv)
    assert caught.value.on_every_rank or caught.value.__cause__ is None
    return str(caught.value)


def test_defaults_are_those_of_the_dataclass() -> None:
    assert parse("--folder", "here") == Outer(folder=Path("here"))


def test_values_of_every_type_are_read() -> None:
    given = ("--rate=1e-3", "--shares=[3, 4]", "--limit=7", "--inner.kind", "hard")
    assert parse("--folder", "a/b", "--weights", '{"x": 2}', *given) == Outer(
        folder=Path("a/b"),
        rate=0.001,
        shares=(3.0, 4.0),
        weights={"x": 2.0},
        limit=7,
        inner=Inner(kind="hard"),
    )


def test_later_values_win_over_earlier_ones(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("{folder: a, rate: 1, limit: 1, inner: {size: 1}}")
    second.write_text("{limit: 2, inner: {size: 2}}")
    files = ("--config", first, "--config", second)
    assert parse("--limit", 0, *files, "--inner.size", 3) == Outer(
        folder=Path("a"), rate=1.0, limit=2, inner=Inner(size=3)
    )


def test_null_is_a_value_of_an_optional_option(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("limit: 4")
    found = parse("--folder", "a", "--config", tmp_path / "a.yaml", "--limit", "null")
    assert found.limit is None


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--rate", "x"), "rate must be a number, got 'x'"),
        (("--inner.size", "1.5"), "inner.size must be a whole number, got '1.5'"),
        (("--inner.kind", "firm"), "inner.kind must be one of soft, hard, got 'firm'"),
        (("--shares", "[1]"), "shares must be a list of 2 numbers, got '[1]'"),
        (("--weights.a", "x"), "weights must be a mapping of names to numbers, got 'x'"),
        (("--limit", "none"), "limit must be a whole number or null, got 'none'"),
        (("--speed", "fast"), "speed must be a whole number or auto, got 'fast'"),
        (("--inner.sizes", "1"), "inner.sizes is not an option; did you mean inner.size?"),
        (("--siez", "1"), "siez is not an option; did you mean inner.size?"),
        (("--iner.size", "1"), "iner.size is not an option; did you mean inner.size?"),
        (("--inner", "x"), "inner is a section, not an option; give its options, as inner.size"),
        (("--rate", "13"), "rate must not be 13"),
    ],
)
def test_message_names_option_value_and_rule(argv: tuple[str, ...], expected: str) -> None:
    assert message(*argv) == expected


@pytest.mark.parametrize(("given", "want"), [("3", 3), ("auto", "auto")])
def test_a_number_or_a_word_is_read(given: str, want: int | str) -> None:
    assert parse("--folder", "here", "--speed", given).speed == want


def test_names_are_not_completed() -> None:
    assert message("--rat", 1) == "rat is not an option; did you mean rate?"


def test_file_is_named_where_its_names_are_wrong(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("inner: {sice: 3}")
    assert message("--config", path) == (
        f"--config {path}: inner.sice is not an option; did you mean inner.size?"
    )


def test_missing_options_are_named() -> None:
    with pytest.raises(ConfigError, match="required: folder"):
        parse()


def test_tags_of_a_file_make_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f'folder: !!python/object/apply:os.mkdir ["{tmp_path / "owned"}"]')
    assert "could not determine a constructor" in message("--config", path)
    assert not (tmp_path / "owned").exists()


def test_help_has_the_words_beside_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Do things." in text
    assert "--inner.size SIZE How many. (type: whole number, default: 3)" in text
