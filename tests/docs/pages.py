"""The pages of the documentation, taken apart for the tests that hold them to the source."""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
GAP = "..."
"""Stands in a template for what is filled in."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its text and the line that it begins on."""

    language: str
    text: str
    line: int


def without_blocks(text: str) -> str:
    """``text`` with every fenced block emptied; lines keep their numbers."""
    return re.sub(r"^```.*?^```$", lambda it: "\n" * it[0].count("\n"), text, flags=re.M | re.S)


def blocks(text: str) -> Iterator[Block]:
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        yield Block(found[1], found[2], text.count("\n", 0, found.start()) + 2)


def program(text: str) -> str:
    """The Python blocks of a page as one program, in which each line has its number on the page."""
    lines = [""] * text.count("\n")
    for block in blocks(text):
        if block.language == "python":
            code = block.text.splitlines()
            lines[block.line - 1 : block.line - 1 + len(code)] = code
    return "\n".join(lines)


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", without_blocks(text), re.M)


def anchor(heading: str) -> str:
    """The name that a page gives to ``heading``, for links."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def sections(text: str) -> dict[str, str]:
    """Text by the heading of the second level that it stands under."""
    parts = re.split(r"^## (.+)\n", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str, head: str) -> list[list[str]]:
    """The rows of all tables whose first column is called ``head``."""
    found: list[list[str]] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        cells = [cell.strip("| ") for cell in cells]
        if inside and not set(line) <= set("|-"):
            found.append(cells)
        inside = inside or cells[0] == head
    return found


@dataclass(frozen=True)
class Template:
    """A text of the source, with ``GAP`` where something is filled in.

    ``maker`` is the name of what is called with it, such as an error or ``require``.
    """

    text: str
    maker: str


@cache
def templates() -> list[Template]:
    """All texts of the product but its docstrings."""
    files = [path for name in ("mpu", "megatron", "tools") for path in (ROOT / name).rglob("*.py")]
    return [found for path in files for found in _templates(ast.parse(path.read_text()))]


def _templates(tree: ast.Module) -> Iterator[Template]:
    constants = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            maker = ast.unparse(node.func).rpartition(".")[2]
            parts = [_text(it, constants) for it in node.args]
            yield from (Template(text, maker) for text in parts if text)
        elif isinstance(node, ast.Return | ast.Assign | ast.NamedExpr):
            text = "" if node.value is None else _text(node.value, constants)
            if text:
                yield Template(text, "")


def _text(node: ast.AST, constants: Mapping[str, ast.expr]) -> str:
    """The text that ``node`` is; none if it is something else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%(\.\d)?[a-z]|\{\}", GAP, node.value)
    if isinstance(node, ast.JoinedStr):
        text = "".join(_text(part, constants) for part in node.values)
        return re.sub(r"\.\.\.( ?\.\.\.)+", GAP, text)
    if isinstance(node, ast.FormattedValue):
        value = node.value
        known = constants.get(value.id) if isinstance(value, ast.Name) else None
        return GAP if known is None else _text(known, {}) or GAP
    return ""
