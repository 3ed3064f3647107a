"""Data, tokenizer and vocabulary.

Datasets are the same files here. Tokenizers are not always: the original reads a vocabulary and
merges, or a name on a hub; here a tokenizer is a file or a folder of this machine.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.config.rules import require
from megatron.errors import ConfigError
from megatron.migration.run import Migration
from megatron.migration.values import number, whole
from megatron.plain import MOST_BYTES, parse_json, read_file
from megatron.tokenizer import load_tokenizer

_TRAIN, _VALID = "train-weighted-split-paths", "valid-weighted-split-paths"


@dataclass(frozen=True)
class _Group:
    """Datasets with their weights, and the ranges of their documents, as shares."""

    blend: Mapping[str, float]
    ranges: frozenset[tuple[float, float]]


def data(run: Migration) -> None:
    """Datasets, their weights, and the shares of training, validation and test."""
    train, valid = _groups(run, _TRAIN), _groups(run, _VALID)
    if train:
        _grouped_data(run, train, valid)
    else:
        _plain_data(run)
    if "data.paths" not in run.settings:
        run.notes.add("to do", "data.paths", "prefixes of .bin/.idx files and their weights")
    if run.flags.values("data-impl") in (["lazy"], ["cached"]):
        run.lose("data-impl", "only memory-mapped files are read; preprocess the text again")
    else:
        run.skip("data-impl", "the format is seen in the file")
    if run.flags.values("dataloader-type") == ["cyclic"]:
        run.lose("dataloader-type", "samples are taken in the order of the shuffled epochs")
    else:
        run.skip("dataloader-type", "samples are taken in order")


def _plain_data(run: Migration) -> None:
    flags = run.flags
    if "data-path" in flags and not run.is_open("data-path"):
        words = flags.values("data-path")
        require(
            len(words) == 1 or len(words) % 2 == 0,
            f"--data-path must be a prefix, or weights and prefixes in turn, got {len(words)} "
            "values",
        )
        pairs = [("1", words[0])] if len(words) == 1 else zip(words[::2], words[1::2], strict=True)
        blend: dict[str, float] = {}
        for weight, path in pairs:
            blend[path] = blend.get(path, 0.0) + flags.read("data-path", weight, number)
        run.settings.give("data.paths", blend, flags.written("data-path"))
    if "split" in flags:
        words = flags.values("split")
        shares = [flags.read("split", share, number) for share in _shares("".join(words))]
        split = [*shares, 0.0, 0.0][:3]
        run.settings.give("data.split", list(map(_short, split)), flags.written("split"))


def _shares(text: str) -> list[str]:
    return [share for share in text.replace("/", ",").split(",") if share]


def _short(value: float) -> float:
    """Without digits that only binary fractions have; a whole number as such."""
    rounded = round(value, 9)
    return int(rounded) if rounded.is_integer() else rounded


def _groups(run: Migration, flag: str) -> list[_Group]:
    """The groups of a flag, or of the file that is named instead."""
    named = _flag_of_groups(run, flag)
    if named not in run.flags or run.is_open(named):
        return []
    texts = run.flags.values(named)
    if named != flag:
        path = run.path("".join(texts))
        if path is None:
            run.notes.add("to do", run.flags.written(named), "that file is not here")
            return []
        texts = shlex.split(_text(path, named))
    return [_group(text, run.flags.written(named)) for text in texts]


def _text(path: Path, flag: str) -> str:
    try:
        return read_file(path, MOST_BYTES).decode()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--{flag} {path} cannot be read: {error}") from error


def _flag_of_groups(run: Migration, flag: str) -> str:
    return flag if flag in run.flags else f"{flag}-path"


def _group(text: str, source: str) -> _Group:
    """Read ``NAME: WEIGHT START:END PATH, ...``."""
    ranges, blend = set(), dict[str, float]()
    try:
        for dataset in text.partition(":")[2].split(","):
            weight, documents, path = dataset.split()
            start, end = documents.split(":")
            ranges.add((float(start), float(end)))
            blend[path] = blend.get(path, 0.0) + float(weight)
    except ValueError as error:
        raise ConfigError(
            f"{source} must be 'NAME: WEIGHT START:END PATH, ...', got '{text:.60}'"
        ) from error
    return _Group(blend, frozenset(ranges))


def _grouped_data(run: Migration, train: list[_Group], valid: list[_Group]) -> None:
    """One blend, whose first documents are trained on, and the next ones validated on."""
    flags = [_flag_of_groups(run, flag) for flag in (_TRAIN, _VALID)]
    source = run.flags.written(flags[0])
    require(len(train) == 1, f"{source}: only one group can be trained on, got {len(train)}")
    end = stop = max(end for _, end in train[0].ranges)
    if train[0].ranges != {(0.0, end)}:
        run.lose(flags[0], "every dataset gives its first documents, up to the same share")
    ranges = frozenset[tuple[float, float]]().union(*(group.ranges for group in valid))
    if len(ranges) == 1 and min(ranges)[0] == end:
        stop = min(ranges)[1]
    if valid and (stop == end or len(valid) > 1 or valid[0].blend != train[0].blend):
        run.lose(
            flags[1], "validation takes the documents after those of training, in the same blend"
        )
    run.settings.give("data.paths", dict(train[0].blend), source)
    shares = [end, stop - end, 1 - stop]
    run.settings.give("data.split", list(map(_short, shares)), source)


def tokenizer(run: Migration) -> None:
    """Where the tokenizer is, and how to bring it there."""
    for flag in ("tokenizer-name-or-path", "tokenizer-model"):
        if flag in run.flags and not run.is_open(flag):
            _named_tokenizer(run, flag)
    if "vocab-file" in run.flags and not run.is_open("vocab-file"):
        _gpt2_tokenizer(run)
    resets = [o for o in ("attention_mask", "position_ids") if f"data.reset_{o}" in run.settings]
    if (resets or "data.eod_mask_loss" in run.settings) and "data.tokenizer" not in run.settings:
        run.settings.give("data.tokenizer", "tokenizer.json", "a stand-in")
        run.notes.add("to do", "data.tokenizer", "the file or folder of the tokenizer")
    run.skip("tokenizer-type", "the kind is seen in the file")


def _named_tokenizer(run: Migration, flag: str) -> None:
    name = "".join(run.flags.values(flag))
    run.settings.give("data.tokenizer", name, run.flags.written(flag))
    if run.path(name) is None:
        run.notes.add(
            "to do",
            "data.tokenizer",
            f"nothing is fetched from a hub; bring the tokenizer's files into a folder {name}",
        )


def _gpt2_tokenizer(run: Migration) -> None:
    vocab, merges = ("".join(run.flags.values(flag)) for flag in ("vocab-file", "merge-file"))
    path = str(Path(vocab).with_name("tokenizer.json"))
    run.settings.give("data.tokenizer", path, run.flags.written("vocab-file"))
    # Quoted twice, for Python and for the shell: the names may be anything.
    program = (
        "from tokenizers import ByteLevelBPETokenizer as T; "
        f"T({vocab!r}, {merges!r}).save({path!r})"
    )
    run.notes.add(
        "to do",
        "data.tokenizer",
        f"a tokenizer is one file here; make it with python -c {shlex.quote(program)}",
    )


def vocabulary(run: Migration) -> None:
    """The size of the vocabulary: what is given, the padded one, or what the tokenizer has.

    Rows that the original pads to are part of its model: they are in its softmax and its saves.
    """
    flags, size = run.flags, run.original.vocab_size
    if size is not None:
        run.settings.give("model.vocab_size", size, "--vocab_size of this tool")
        run.skip("pad-vocab-size-to", "--vocab_size was given; any size goes over any tensor size")
    elif "pad-vocab-size-to" in flags:
        run.take("pad-vocab-size-to", "model.vocab_size", whole)
        run.notes.add(
            "different",
            "model.vocab_size",
            "is the padded size, as in the saves of the original; the tokenizer's own size is not "
            "among the flags: to train without the spare rows, give it with --vocab_size",
        )
    elif "vocab-size" in flags:
        run.take("vocab-size", "model.vocab_size", whole)
    else:
        _size_of_tokenizer(run)


def _size_of_tokenizer(run: Migration) -> None:
    for flag, count in _COUNTS.items():
        path = run.path("".join(run.flags.values(flag)))
        if flag in run.flags and path is not None:
            more = run.flags.one("vocab-extra-ids", whole) if "vocab-extra-ids" in run.flags else 0
            run.settings.give("model.vocab_size", count(path) + more, run.flags.written(flag))
            return
    named = [run.flags.written(flag) for flag in _COUNTS if flag in run.flags]
    raise ConfigError(
        "the flags do not tell the size of the vocabulary, and the tokenizer is not here "
        f"({', '.join(named) or 'none is named'}); give the size with --vocab_size"
    )


def _count_json(path: Path) -> int:
    try:
        vocab = parse_json(read_file(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--vocab-file {path} cannot be read: {error}") from error
    require(isinstance(vocab, Mapping), f"--vocab-file {path} must map tokens to numbers")
    return len(vocab)


def _count_tokens(path: Path) -> int:
    return load_tokenizer(path).vocab_size


_COUNTS = {
    "vocab-file": _count_json,
    "tokenizer-name-or-path": _count_tokens,
    "tokenizer-model": _count_tokens,
}
