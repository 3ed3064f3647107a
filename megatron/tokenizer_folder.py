"""What a folder of transformers may say, before that library reads it.

Its files name classes, further files and code of their own, and which of these the library looks
up differs from version to version. Here each such entry is refused by name, or has to be what an
ordinary tokenizer has. So the library meets files of the folder, and classes that are tokenizers.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron.errors import DataError
from megatron.plain import PlainDataError, leads_out, parse_json, read_file

TOKENIZER_CONFIG = "tokenizer_config.json"

_READ = (TOKENIZER_CONFIG, "config.json", "special_tokens_map.json", "added_tokens.json")
_TEMPLATES = "additional_chat_templates"
# What a tokenizer reads; the weights of a model may lie beside it.
_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".bpe", ".vocab", ".codes", ".py")

_CLASS = re.compile(r"[A-Za-z0-9_]*Tokenizer(Fast)?|TokenizersBackend|PythonBackend")
_NO_CLASSES = ("AutoTokenizer", "AutoTokenizerFast")
_TEMPLATE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_REFUSED = (
    "__slow_tokenizer",
    "auto_map",
    "backend_tokenizer",
    "cache_dir",
    "gguf_file",
    "init_inputs",
    "proxies",
    "revision",
    "subfolder",
    "tokenizer_object",
    "tokenizer_type",
    "trust_remote_code",
)
# Where a folder was once read from, as some say; the library opens none of them.
_NEVER_OPENED = ("special_tokens_map_file", "tokenizer_config_file")
_MODEL_OPTIONS = ("add_bos", "add_eos", "alpha", "enable_sampling", "nbest_size", "reverse")


def check_folder(folder: Path) -> None:
    """Refuse a folder that names code or files outside of it.

    Raises:
        DataError: naming the file, the entry and the rule.
    """
    try:
        _check(folder)
    except PlainDataError as error:
        raise DataError(f"{folder}: {error}") from error


def _check(folder: Path) -> None:
    for path in _files(folder):
        outside = leads_out(path, folder)
        if outside is not None:
            raise PlainDataError(
                f"{path.name} is a link to {outside}, outside of the folder; copy the folder with "
                "its links resolved (cp -rL) and give the copy"
            )
        if not path.is_file():
            raise PlainDataError(f"{path.name} is not a regular file")
    for name in _READ:
        if (folder / name).exists():
            _check_values(folder / name, _read(folder / name))


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name == _TEMPLATES:
            outside = leads_out(path, folder)
            if outside is not None or not path.is_dir():
                raise PlainDataError(f"{path.name} must be a folder inside of it")
            yield from sorted(path.iterdir())
        elif path.name.endswith(_SUFFIXES):
            yield path


def _read(path: Path) -> Mapping[str, Any]:
    try:
        values = parse_json(read_file(path))
    except OSError as error:
        raise PlainDataError(f"{path.name} cannot be read: {error.strerror}") from error
    except PlainDataError as error:
        raise PlainDataError(f"{path.name} {error}") from error
    if not isinstance(values, dict):
        raise PlainDataError(f"{path.name} must be a JSON object, got {values!r:.60}")
    return values


def _check_values(path: Path, values: Mapping[str, Any]) -> None:
    for name in _REFUSED:
        if values.get(name):
            _refuse(path, name, values, "code and files that it names are not looked up")
    name = "tokenizer_class"
    kind = values.get(name)
    if kind is not None and not _is_class(kind):
        _refuse(path, name, values, "must be the name of a tokenizer of transformers")
    for name, value in values.items():
        if name.endswith(("_file", "_files")) and name not in _NEVER_OPENED and value is not None:
            _check_file(path, name, values)
    options = values.get("sp_model_kwargs") or {}
    if not isinstance(options, dict) or not set(options) <= set(_MODEL_OPTIONS):
        _refuse(path, "sp_model_kwargs", values, f"may have {', '.join(_MODEL_OPTIONS)} only")
    for template in _template_names(values.get("chat_template")):
        if not isinstance(template, str) or not _TEMPLATE.fullmatch(template):
            _refuse(path, "chat_template", values, "a template's name must be a plain word")


def _is_class(name: object) -> bool:
    return isinstance(name, str) and bool(_CLASS.fullmatch(name)) and name not in _NO_CLASSES


def _check_file(path: Path, name: str, values: Mapping[str, Any]) -> None:
    """A file may be named that the folder has."""
    names = values[name] if isinstance(values[name], list) else [values[name]]
    for other in names:
        plain = isinstance(other, str) and Path(other).name == other and other not in ("", "..")
        if not plain or not (path.parent / other).is_file():
            _refuse(path, name, values, "must name files that the folder has; or remove the entry")


def _template_names(templates: object) -> list[Any]:
    if isinstance(templates, dict):
        return list(templates)
    if isinstance(templates, list):
        return [it.get("name") if isinstance(it, dict) else it for it in templates]
    return []


def _refuse(path: Path, name: str, values: Mapping[str, Any], rule: str) -> None:
    raise PlainDataError(f"{path.name}: {name} ({values[name]!r:.60}): {rule}")
