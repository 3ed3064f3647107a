"""The page about every option, docs/configuration.md, from the dataclasses."""

from collections.abc import Iterator

from megatron.config.help import Option, Section, sections
from megatron.config.root import Config

_HEAD = """\
# Configuration

Every option of a run. This page is written by `python tools/configuration_page.py` from the
dataclasses in `megatron/config/`, and a test compares it with them. `bloom train --help` shows the
most used options, `--help SECTION` those of a section.

- **On the command line** an option is `--section.option VALUE`, with `-` or `_`. The later wins.
- **In a file** for `--config` sections are nested, as `optimizer: {lr: 1e-4}`. `--print_config`
  prints a whole one.
- **By its name**, `--config bloom-560m` takes a file that comes with bloom, wherever it is called.
  A file of that name in the current folder is `./bloom-560m`.
- **Lengths** of schedules are counted in samples, each of `model.seq_length` tokens; intervals are
  counted in steps, and times in seconds. The words beside an option say which.
"""


def configuration_page() -> str:
    """The page, as Markdown."""
    return "\n".join([_HEAD, *(line for it in sections(Config) for line in _section_lines(it))])


def _section_lines(section: Section) -> Iterator[str]:
    yield f"## {section.name or 'The root'}"
    yield ""
    yield f"{section.title}."
    yield ""
    if section.options:
        yield "| option | type | default | |"
        yield "|---|---|---|---|"
        yield from map(_row, section.options)
        yield ""


def _row(option: Option) -> str:
    default = "required" if option.default is None else f"`{option.default}`"
    cells = (f"`{option.name}`", option.type, default, option.words)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
