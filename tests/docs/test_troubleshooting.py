"""docs/troubleshooting.md quotes messages of the source, under the exit codes of their errors."""

import re

import pytest

from megatron import errors
from tests.docs.pages import GAP, ROOT, rows, sections, templates, without_blocks

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
CODES = {
    kind.__name__: kind.exit_code
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.RunError)
} | {"require": errors.ConfigError.exit_code}


def quoted() -> list[tuple[str, int | None]]:
    """Each message of the page, and the exit code that it stands under."""
    found = []
    for heading, text in sections(PAGE).items():
        code = re.match(r"Exit code (\d+)", heading)
        for cells in rows(text, "message"):
            message = re.fullmatch(r"`(.+)`", cells[0])
            assert message is not None, cells[0]
            found.append((message[1], int(code[1]) if code else None))
    return found


def codes_of(message: str) -> set[int | None]:
    """The exit codes of the texts that ``message`` is a part of; None is one not known."""
    part = message.removeprefix(GAP).removesuffix(GAP)
    return {CODES.get(it.maker) for it in templates() if part in it.text}


@pytest.mark.parametrize(("message", "code"), quoted())
def test_message_is_in_the_source_under_its_exit_code(message: str, code: int | None) -> None:
    assert len(re.sub(r"\W", "", message)) >= 8, "too little to be found by"
    found = codes_of(message)
    assert found, "no text of the source is like this"
    assert code is None or found & {code, None}, f"ends with {found}"


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("folder ... is held by a friend: ...", 2),
        ("...: the save needs ... bytes, but only ... are free", 4),
    ],
)
def test_wrong_message_or_code_is_noticed(message: str, code: int) -> None:
    assert code not in codes_of(message)


def test_every_exit_code_has_a_section_with_messages() -> None:
    told = {code for _, code in quoted() if code is not None}
    assert told == {code for code in CODES.values() if code != errors.RunError.exit_code}


def test_messages_in_the_text_are_in_the_source() -> None:
    """Those in code that have a gap and words on both sides of it, or end in one."""
    prose = re.sub(r"^\|.*$", "", without_blocks(PAGE), flags=re.M)
    spans = [" ".join(it.split()) for it in re.findall(r"`([^`]+)`", prose)]
    spans += re.findall(r"`([^`]+)`", "".join(cells[1] for cells in rows(PAGE, "seen")))
    messages = [it for it in spans if "..." in it and " " in it]
    assert len(messages) >= 4
    assert [it for it in messages if not codes_of(it)] == []
