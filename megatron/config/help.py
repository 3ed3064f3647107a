"""What ``--help`` says of a config: its options, in sections, with the words beside the fields."""

import ast
import inspect
import textwrap
from argparse import ArgumentParser
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def build_help(config: type, prog: str, description: str) -> ArgumentParser:
    """A parser that is there for its help and its errors only."""
    parser = ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with any of the options below; may be repeated")
    parser.add_argument(
        "--print_config",
        action="store_true",
        help="Print the configuration after applying all other arguments and exit.",
    )
    _add_section(parser, config, "")
    return parser


def _add_section(parser: ArgumentParser, config: type, prefix: str) -> None:
    group = parser.add_argument_group((config.__doc__ or "").rstrip("."))
    hints, words = get_type_hints(config), _field_words(config)
    sections = []
    for field in fields(config):
        hint, name = hints[field.name], f"{prefix}{field.name}"
        if isinstance(hint, type) and is_dataclass(hint):
            sections.append((hint, f"{name}."))
            continue
        about = _about(hint, field)
        group.add_argument(
            f"--{name}",
            metavar=_choices(hint) or field.name.upper(),
            help=f"{words.get(field.name, '')} ({about})".strip().replace("%", "%%"),
        )
    for section, name in sections:
        _add_section(parser, section, name)


def _field_words(config: type) -> dict[str, str]:
    """The text that stands below each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _about(hint: Any, field: "Field[Any]") -> str:
    kind = f"type: {_type_name(hint)}"
    if field.default is not MISSING:
        return f"{kind}, default: {'null' if field.default is None else field.default}"
    if field.default_factory is not MISSING:
        return f"{kind}, default: {field.default_factory()}"
    return f"required, {kind}"


def _choices(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, get_args(hint))) + "}"
    return "{true,false}" if hint is bool else ""


def _type_name(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (UnionType, Union):
        return " | ".join(map(_type_name, parts))
    if origin is Literal:
        return ", ".join(map(str, parts))
    if hint is NoneType:
        return "null"
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_type_name, parts))}]"
    return str(getattr(hint, "__name__", hint))
