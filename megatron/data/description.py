"""What is known of a dataset besides its tokens: PREFIX.json, beside PREFIX.bin and PREFIX.idx.

The file is optional, since datasets made by other programs have none. Where it is, the tokenizer of
a run can be compared with that of the data, losses can be given per byte of text, and the largest
token id is known without reading all of the data.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.atomic import atomic_write
from megatron.errors import DataError


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
    """

    dataset: str
    tokenizer: str
    vocab_size: int
    largest_token: int
    documents: int
    tokens: int
    utf8_bytes: int


def description_path(prefix: str | Path) -> Path:
    """The file that describes a dataset."""
    return Path(f"{prefix}.json")


def write_description(prefix: str | Path, description: Description) -> None:
    """Write PREFIX.json."""
    with atomic_write(description_path(prefix)) as file:
        file.write(json.dumps(asdict(description), indent=2).encode() + b"\n")


def read_description(prefix: str | Path) -> Description | None:
    """What PREFIX.json says, or None if there is no such file.

    Raises:
        DataError: if the file is not a description.
    """
    path = description_path(prefix)
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    types = Description.__annotations__
    found = {name: type(value) for name, value in values.items()} if type(values) is dict else {}
    if found != types:
        expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in types.items())
        raise DataError(f"{path}: is not the description of a dataset, which has {expected}")
    return Description(**values)


def bytes_per_token(paths: Mapping[str, float]) -> float | None:
    """Bytes of text behind one token, over the blend ``paths`` of prefixes and weights.

    None if a dataset has no description.
    """
    num_bytes = 0.0
    total = sum(paths.values())
    for prefix, weight in paths.items():
        description = read_description(prefix)
        if description is None or description.tokens == 0:
            return None
        num_bytes += weight / total * description.utf8_bytes / description.tokens
    return num_bytes
