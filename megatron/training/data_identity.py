"""The data that a save was made with: written into it, and compared when a run goes on from it.

Data is what its tokens are, wherever its files lie. A run that went on with other data under the
same name would be another run than its saves and its log tell, and so it has to be asked for by
``checkpoint.accept_new_data``.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch.distributed import ProcessGroup

from megatron.config import Config
from megatron.data.content import Findings
from megatron.errors import CheckpointError
from megatron.together import run_on_first
from megatron.tokenizer import Tokenizer
from megatron.training.saved_run import SavedRun

logger = logging.getLogger(__name__)

OPTION = "checkpoint.accept_new_data"
STATE = "data"

_PROBED_TOKENS = 1 << 15
_DIGITS = 12
"""Shares may be given on any scale."""

DataState: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class DataIdentity:
    """What the data of a run is, as names and JSON, and whether it is that of the save."""

    values: DataState
    is_same: bool

    def to_state(self) -> dict[str, DataState]:
        """What a save keeps of it."""
        return {STATE: self.values}


def agree_on_data(
    config: Config,
    findings: Findings,
    tokenizer: Tokenizer | None,
    newest: SavedRun | None,
    group: ProcessGroup | None,
) -> DataIdentity:
    """What the data of the run is. Collective over ``group``, whose first rank reads data.

    Raises:
        CheckpointError: on every rank, if ``newest``, which the run goes on from, was made with
            other data and that is not accepted.
    """

    def compare() -> DataIdentity:
        now = data_state(config, findings, tokenizer)
        accept = config.checkpoint.accept_new_data
        same = newest is None or check_data(newest.reader.state, newest.path, now, accept=accept)
        return DataIdentity(now, same)

    return run_on_first(compare, group)


def data_state(config: Config, findings: Findings, tokenizer: Tokenizer | None) -> DataState:
    """What a save tells of the data of a run, as names and JSON; for a rank that reads data."""
    total = sum(config.data.paths.values())
    datasets = [
        {
            "path": prefix,
            "index": findings.contents[prefix].fingerprint,
            "content": findings.contents[prefix].hash,
            "weight": round(weight / total, _DIGITS),
        }
        for prefix, weight in config.data.paths.items()
    ]
    return {
        "datasets": datasets,
        "split": [round(share / sum(config.data.split), _DIGITS) for share in config.data.split],
        "seed": config.train.seed,
        "tokenizer": None if tokenizer is None else tokenizer_identity(tokenizer),
    }


def check_data(
    saved: Mapping[str, Any], save: Path, now: Mapping[str, Any], *, accept: bool
) -> bool:
    """Whether the data is that of ``save``; if not, tell of it, or refuse unless it is accepted.

    Args:
        saved: the state in the save.
        now: what ``data_state`` gave.

    Raises:
        CheckpointError: naming what differs.
    """
    if STATE not in saved:
        logger.warning(
            "%s: an earlier version wrote it, which did not tell of its data: whether corpus, "
            "tokenizer, seed and split are the same could not be compared",
            save,
        )
        return True
    differences = list(_differences(_table(saved[STATE]), now))
    if not differences:
        return True
    text = "; ".join(differences)
    if not accept:
        raise CheckpointError(
            f"{save}: was made with other data: {text}; {OPTION} true goes on with what is now"
        )
    logger.warning("%s: goes on with other data, as %s says: %s", save, OPTION, text)
    return False


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    datasets = saved.get("datasets")
    known = [_table(it) for it in datasets] if isinstance(datasets, list) else []
    yield from _dataset_differences(known, now["datasets"])
    for name, option in (("split", "data.split"), ("seed", "train.seed")):
        if saved.get(name) != now[name]:
            yield f"{option} is {now[name]}, but was {saved.get(name)}"
    before, after = saved.get("tokenizer"), now["tokenizer"]
    if before != after:
        yield f"data.tokenizer is {after or 'none'}, but was {before or 'none'}"


def _table(value: object) -> Mapping[str, Any]:
    """``value``, which may be anything that JSON can be, as what it should be."""
    return value if isinstance(value, dict) else {}


def _dataset_differences(
    saved: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    if len(saved) != len(now):
        yield f"data.paths has {len(now)} datasets, but had {len(saved)}"
        return
    for before, after in zip(saved, now, strict=True):
        where = f"data.paths {after['path']}"
        if (before.get("index"), before.get("content")) != (after["index"], after["content"]):
            yield (
                f"{where} is {after['index']} (index) and {after['content']} (tokens), but "
                f"{before.get('path')} was {before.get('index')} and {before.get('content')}"
            )
        elif before.get("weight") != after["weight"]:
            yield f"{where} has the share {after['weight']}, but had {before.get('weight')}"


def tokenizer_identity(tokenizer: Tokenizer) -> str:
    """32 hex digits that tell tokenizers apart: by their vocabulary, and by how they cut it.

    A vocabulary does not say which tokens a text becomes: that depends on merges and more. So the
    texts of many tokens are encoded again.
    """
    number = tokenizer.vocab_size
    step = max(1, number // _PROBED_TOKENS)
    texts = [tokenizer.decode([token]) for token in sorted(tokenizer.vocabulary.values())[::step]]
    probe = json.dumps([tokenizer.fingerprint, tokenizer.encode_batch(texts)])
    return hashlib.blake2b(probe.encode(), digest_size=16).hexdigest()
