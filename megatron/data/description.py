"""What is known of a dataset besides its tokens: PREFIX.json, beside PREFIX.bin and PREFIX.idx.

The file is optional, since datasets made by other programs have none. Where it is, the tokenizer of
a run can be compared with that of the data, and losses can be given per byte of text.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.atomic import atomic_write
from megatron.errors import DataError
from megatron.plain import MOST_INT, parse_json, read_file

_OPTIONAL: dict[str, type] = {"content": str, "text_bytes": str}


@dataclass(frozen=True, kw_only=True)
class Description:
    """How a dataset was made.

    Attributes:
        dataset: fingerprint of the .bin and .idx files.
        tokenizer: fingerprint of the tokenizer.
        vocab_size: number of tokens that the tokenizer knows.
        largest_token: the largest token id in the data.
        documents: number of documents.
        tokens: number of tokens, those at the ends of documents included.
        utf8_bytes: length of the text.
        content: hash of the .bin file; earlier versions wrote none.
        text_bytes: hash of the file of the lengths of all texts, see text_bytes.py; likewise.
    """

    dataset: str
    tokenizer: str
    vocab_size: int
    largest_token: int
    documents: int
    tokens: int
    utf8_bytes: int
    content: str | None = None
    text_bytes: str | None = None


_REQUIRED: dict[str, type] = {
    name: kind for name, kind in Description.__annotations__.items() if name not in _OPTIONAL
}


def description_path(prefix: str | Path) -> Path:
    """The file that describes a dataset."""
    return Path(f"{prefix}.json")


def write_description(prefix: str | Path, description: Description) -> None:
    """Write PREFIX.json."""
    values = {name: value for name, value in asdict(description).items() if value is not None}
    with atomic_write(description_path(prefix)) as file:
        file.write(json.dumps(values, indent=2).encode() + b"\n")


def read_description(prefix: str | Path) -> Description | None:
    """What PREFIX.json says, or None if there is no such file.

    Raises:
        DataError: if the file is not a description.
    """
    path = description_path(prefix)
    try:
        values = parse_json(read_file(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict) or not _is_description(values):
        expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in _REQUIRED.items())
        optional = ", ".join(f"{name} ({kind.__name__})" for name, kind in _OPTIONAL.items())
        raise DataError(
            f"{path}: is not the description of a dataset, which has {expected}, "
            f"and may have {optional}"
        )
    return Description(**values)


def _is_description(values: Mapping[str, Any]) -> bool:
    known = {**_REQUIRED, **_OPTIONAL}
    return set(_REQUIRED) <= set(values) and all(
        name in known and type(value) is known[name] and _is_count_or_text(value)
        for name, value in values.items()
    )


def _is_count_or_text(value: Any) -> bool:
    return isinstance(value, str) or 0 <= value < MOST_INT
