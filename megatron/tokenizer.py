"""Tokenizers of three kinds behind one class.

    what load_tokenizer is given            library          saved as
    a .json file, or a folder with nothing  tokenizers       tokenizer.json
      but tokenizer.json
    a folder with tokenizer_config.json     transformers     the files of that folder
    a .model file, or a folder with         sentencepiece    tokenizer.model
      nothing but tokenizer.model

Text is encoded as it is: no token is added at its beginning or end. Files are read from this
machine only, and code that comes with a tokenizer is never run.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron.atomic import atomic_write, make_folder
from megatron.errors import DataError
from megatron.plain import leads_out, read_file
from megatron.tokenizer_folder import TOKENIZER_CONFIG, check_folder

EOD_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<eod>")
SPECIAL_NAMES = {
    "bos_token": ("<s>", "<bos>"),
    "eos_token": EOD_NAMES,
    "unk_token": ("<unk>",),
    "pad_token": ("<pad>",),
}

_TOKENIZERS_FILE = "tokenizer.json"
_SENTENCEPIECE_FILE = "tokenizer.model"

# The libraries raise whatever they like on a broken file; a panic of one is no Exception. These
# come from elsewhere.
_NOT_THEIRS = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)


class Tokenizer(ABC):
    """Text to token ids and back."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    @abstractmethod
    def vocabulary(self) -> dict[str, int]:
        """The id of every token, added tokens included."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text.

        Raises:
            DataError: if the tokenizer cannot, as one that knows no token for a word.
        """
        try:
            return self._encode(texts)
        except _NOT_THEIRS:
            raise
        except BaseException as error:
            raise DataError(f"{self.path}: cannot encode a text: {_reason(error)}") from error

    @abstractmethod
    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """What the library makes of each text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens written out where the library can."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """The files, by name relative to their folder, that ``load_tokenizer`` needs."""

    @abstractmethod
    def export_transformers(self, folder: Path) -> None:
        """Write what ``transformers.AutoTokenizer.from_pretrained(folder)`` opens.

        Raises:
            DataError: if this kind of tokenizer cannot be written so.
        """

    @property
    def vocab_size(self) -> int:
        """Number of token ids, up to the largest."""
        return max(self.vocabulary.values()) + 1

    @property
    def eod_id(self) -> int:
        """Id of the token that ends a document.

        Raises:
            DataError: if the tokenizer has no token of the usual names.
        """
        found = [self.vocabulary[name] for name in EOD_NAMES if name in self.vocabulary]
        if not found:
            names = ", ".join(EOD_NAMES)
            raise DataError(f"{self.path}: has no end-of-document token, which is one of {names}")
        return found[0]

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that identify the vocabulary: which token each id stands for.

        Equal for the same tokenizer in another format or place.
        """
        entries = sorted((number, token) for token, number in self.vocabulary.items())
        return hashlib.blake2b(json.dumps(entries).encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The token ids of ``text``."""
        return self.encode_batch([text])[0]

    def save(self, folder: Path) -> None:
        """Write ``files()`` into ``folder``, so that ``load_tokenizer(folder)`` gives this again.

        Raises:
            DiskError: if they cannot be written.
        """
        _write_files(folder, self.files())


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        make_folder((folder / name).parent)
        with atomic_write(folder / name) as file:
            file.write(content)


class _TokenizersTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library, of one JSON file."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        super().__init__(path)
        self._content = read_file(path)
        self._backend = Backend.from_buffer(self._content)
        self._backend.no_truncation()
        self._backend.no_padding()

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def files(self) -> dict[str, bytes]:
        return {_TOKENIZERS_FILE: self._content}

    def export_transformers(self, folder: Path) -> None:
        specials = {
            role: next((name for name in names if name in self.vocabulary), None)
            for role, names in SPECIAL_NAMES.items()
        }
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{role: name for role, name in specials.items() if name is not None},
        }
        content = json.dumps(config, indent=2).encode() + b"\n"
        _write_files(folder, {**self.files(), TOKENIZER_CONFIG: content})


class _TransformersTokenizer(Tokenizer):
    """A tokenizer of the transformers library, of a folder."""

    def __init__(self, path: Path) -> None:
        check_folder(path)
        from transformers import AutoTokenizer

        super().__init__(path)
        self._backend: Any = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        return dict(self._backend.get_vocab())

    @property
    def eod_id(self) -> int:
        declared = self._backend.eos_token_id
        return super().eod_id if declared is None else int(declared)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            # The library fails on none.
            return []
        encodings = self._backend(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return list(encodings["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), clean_up_tokenization_spaces=False))

    def files(self) -> dict[str, bytes]:
        with TemporaryDirectory() as name:
            self.export_transformers(Path(name))
            paths = sorted(path for path in Path(name).rglob("*") if path.is_file())
            return {path.relative_to(name).as_posix(): path.read_bytes() for path in paths}

    def export_transformers(self, folder: Path) -> None:
        self._backend.save_pretrained(str(folder))


class _SentencePieceTokenizer(Tokenizer):
    """A tokenizer of the sentencepiece library, of one model file."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        super().__init__(path)
        self._content = read_file(path)
        self._backend: Any = SentencePieceProcessor()
        self._backend.LoadFromSerializedProto(self._content)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        count = self._backend.GetPieceSize()
        return {self._backend.IdToPiece(number): number for number in range(count)}

    @property
    def eod_id(self) -> int:
        declared = int(self._backend.eos_id())
        return super().eod_id if declared < 0 else declared

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(ids) for ids in self._backend.Encode(list(texts), out_type=int)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.Decode(list(ids)))

    def files(self) -> dict[str, bytes]:
        return {_SENTENCEPIECE_FILE: self._content}

    def export_transformers(self, folder: Path) -> None:
        raise DataError(
            f"{self.path}: a sentencepiece model cannot be exported for transformers; "
            "expected a tokenizers .json file or a transformers folder"
        )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer: a tokenizers .json, a transformers folder, or a sentencepiece .model.

    Raises:
        DataError: if there is none at ``path``, or it cannot be read.
    """
    path = Path(path)
    kind, file = _find(path)
    try:
        tokenizer = kind(file)
        if not tokenizer.vocabulary:
            raise DataError(f"{path}: has no tokens")
    except (DataError, *_NOT_THEIRS):
        raise
    except BaseException as error:
        raise DataError(f"{path}: cannot be read as a tokenizer: {_reason(error)}") from error
    return tokenizer


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _find(path: Path) -> tuple[type[Tokenizer], Path]:
    """Which kind of tokenizer is at ``path``, and what to open."""
    if not path.exists():
        raise DataError(f"{path}: no such tokenizer; expected a .json or .model file or a folder")
    if (path / TOKENIZER_CONFIG).is_file():
        return _TransformersTokenizer, path
    if path.is_dir():
        inside = [path / _TOKENIZERS_FILE, path / _SENTENCEPIECE_FILE]
        folder, path = path, next((file for file in inside if file.exists()), path)
        outside = leads_out(path, folder)
        if outside is not None:
            raise DataError(
                f"{path}: is a link to {outside}, outside of the tokenizer's folder; give the file "
                "itself"
            )
    kinds: dict[str, type[Tokenizer]] = {
        ".json": _TokenizersTokenizer,
        ".model": _SentencePieceTokenizer,
    }
    if path.is_dir() or path.suffix not in kinds:
        raise DataError(
            f"{path}: is not a tokenizer; expected a .json or .model file, or a folder with "
            f"{TOKENIZER_CONFIG}, {_TOKENIZERS_FILE} or {_SENTENCEPIECE_FILE}"
        )
    return kinds[path.suffix], path
