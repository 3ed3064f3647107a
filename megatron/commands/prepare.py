"""Turn text into the token files that training reads.

    bloom prepare --input corpus.jsonl --tokenizer tokenizer.json --output corpus

writes corpus.bin, corpus.idx, corpus.bytes and corpus.json. The main process reads the files and
hands batches of records to the workers; it takes their tokens back in the same order, so that the
output does not depend on the number of workers. Only a few batches are on their way at any time, so
that memory does not grow with the corpus. A record without usable text is counted and told, and
left out.
"""

import argparse
import os
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.atomic import make_folder
from megatron.commands.arguments import CommandParser, add_overwrite, check_output
from megatron.commands.progress import Progress, bytes_to_read
from megatron.data.corpus import SUFFIXES, BadRecordError, Record, find_files, read_records
from megatron.data.description import Description, write_description
from megatron.data.indexed_dataset import (
    IndexedDataset,
    IndexedDatasetWriter,
    bin_path,
    dtype_for_vocab,
)
from megatron.data.text_bytes import write_text_bytes
from megatron.errors import DataError, RunError, printable
from megatron.hashing import hash_file
from megatron.tokenizer import Tokenizer, load_tokenizer

BATCH_BYTES = 1 << 19
BATCHES_PER_WORKER = 4
BAD_RECORDS_SHOWN = 5
WRITTEN = (".bin", ".idx", ".bytes", ".json")


@dataclass(frozen=True)
class Encoding:
    """How records become tokens.

    Attributes:
        tokenizer: path of the tokenizer.
        json_key: where the text is in a JSON object.
        append_eod: whether each document ends with the end-of-document token.
    """

    tokenizer: Path
    json_key: str
    append_eod: bool


@dataclass(frozen=True)
class EncodedBatch:
    """The tokens of a batch of records.

    Attributes:
        documents: those of each document, int32.
        bad: place and defect of each record that was left out.
        utf8_bytes: length of the text of each document.
        read_bytes: length of the records.
    """

    documents: list[NDArray[np.int32]]
    bad: list[str]
    utf8_bytes: list[int]
    read_bytes: int


@dataclass
class Totals:
    """What has been written so far."""

    documents: int = 0
    tokens: int = 0
    utf8_bytes: int = 0
    read_bytes: int = 0
    largest_token: int = 0
    bad: int = 0
    first_bad: list[str] = field(default_factory=list)
    text_bytes: "array[int]" = field(default_factory=lambda: array("Q"))

    def count(self, batch: EncodedBatch) -> None:
        """Add one batch."""
        self.documents += len(batch.documents)
        self.tokens += sum(map(len, batch.documents))
        self.utf8_bytes += sum(batch.utf8_bytes)
        self.text_bytes.extend(batch.utf8_bytes)
        self.read_bytes += batch.read_bytes
        largest = (int(ids.max()) for ids in batch.documents if len(ids) > 0)
        self.largest_token = max(self.largest_token, *largest, 0)
        self.bad += len(batch.bad)
        self.first_bad += batch.bad[: BAD_RECORDS_SHOWN - len(self.first_bad)]


@cache
def _tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of this process."""
    return load_tokenizer(path)


def encode_batch(encoding: Encoding, records: Sequence[Record]) -> EncodedBatch:
    """Encode the records that hold text; in a worker."""
    tokenizer = _tokenizer(encoding.tokenizer)
    texts, bad = [], []
    for record in records:
        try:
            texts.append(record.text(encoding.json_key))
        except BadRecordError as error:
            bad.append(f"{record.place}: {error}")
    end = [tokenizer.eod_id] if encoding.append_eod else []
    return EncodedBatch(
        documents=[np.array(ids + end, np.int32) for ids in tokenizer.encode_batch(texts)],
        bad=bad,
        utf8_bytes=[len(text.encode()) for text in texts],
        read_bytes=sum(len(record.content) for record in records),
    )


def cut_batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Runs of records of about BATCH_BYTES."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.content)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_all(
    encoding: Encoding, records: Iterable[Record], workers: int
) -> Iterator[EncodedBatch]:
    """Encode batches on ``workers`` processes, and give them back in order."""
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _use_one_thread)
    pending: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in cut_batches(records):
            pending.append(pool.submit(encode_batch, encoding, batch))
            if len(pending) >= BATCHES_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise RunError("a worker was killed, perhaps because memory ran out") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _use_one_thread() -> None:
    # Workers are the only parallelism: threads of the tokenizers library would fight over cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def write_dataset(
    prefix: Path, vocab_size: int, batches: Iterable[EncodedBatch], progress: Progress
) -> Totals:
    """Write PREFIX.bin and PREFIX.idx, and tell ``progress`` of each batch.

    Raises:
        DataError: if no record holds text; nothing is written then.
    """
    totals = Totals()
    with IndexedDatasetWriter(prefix, dtype_for_vocab(vocab_size)) as writer:
        for batch in batches:
            for ids in batch.documents:
                writer.add(ids)
                writer.end_document()
            totals.count(batch)
            progress.update(totals.read_bytes, f"{totals.documents:,} documents")
        if totals.documents == 0:
            first = f", first {totals.first_bad[0]}" if totals.first_bad else ""
            raise DataError(f"no text in the input: {totals.bad} bad records{first}")
    progress.close()
    print(_summary(totals, progress.seconds))
    return totals


def _summary(totals: Totals, seconds: float) -> str:
    """Amount and speed."""
    return (
        f"{totals.documents:,} documents, {totals.tokens:,} tokens in {seconds:.1f} s "
        f"({totals.documents / seconds:,.0f} documents/s, "
        f"{totals.read_bytes / seconds / 1e6:.1f} MB/s)"
    )


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        "prepare",
        "Turn text into the token files that training reads.",
        ["bloom prepare --input text/ --tokenizer tokenizer.json --output data/text --workers 8"],
    )
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        help=f"files ({', '.join(SUFFIXES)}) or folders of them; a .txt file is one document",
    )
    parser.add_argument("--json_key", default="text", help="key of the text (default: text)")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="tokenizers .json file, transformers folder or sentencepiece .model file",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="prefix of the .bin, .idx, .bytes and .json files",
    )
    parser.add_argument(
        "--append_eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document token",
    )
    parser.add_argument("--workers", type=int, default=1, help="worker processes (default: 1)")
    add_overwrite(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Write the token files that the command line asks for; return the exit code."""
    parser = build_parser()
    args = parser.parse(argv)
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    check_output(args, "--output", [Path(f"{args.output}{suffix}") for suffix in WRITTEN])
    tokenizer = load_tokenizer(args.tokenizer)
    encoding = Encoding(args.tokenizer, args.json_key, args.append_eod)
    files = find_files(args.input)
    make_folder(args.output.parent)
    batches = encode_all(encoding, read_records(files), args.workers)
    progress = Progress(bytes_to_read(files))
    totals = write_dataset(args.output, tokenizer.vocab_size, batches, progress)
    write_description(args.output, describe(args.output, tokenizer, totals))
    report(args.output, totals)
    return 0


def describe(prefix: Path, tokenizer: Tokenizer, totals: Totals) -> Description:
    """What PREFIX.json is to say; writes the lengths of the texts too."""
    dataset = IndexedDataset(prefix)
    return Description(
        dataset=dataset.fingerprint,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        largest_token=totals.largest_token,
        documents=totals.documents,
        tokens=totals.tokens,
        utf8_bytes=totals.utf8_bytes,
        content=hash_file(bin_path(prefix)),
        text_bytes=write_text_bytes(prefix, totals.text_bytes),
    )


def report(prefix: Path, totals: Totals) -> None:
    """Print what was written, and what was left out."""
    print(f"wrote {prefix}.bin, {prefix}.idx, {prefix}.bytes and {prefix}.json")
    print(f"{totals.utf8_bytes / totals.tokens:.3f} bytes of text per token")
    if totals.bad > 0:
        print(f"left out {totals.bad} bad records, first of them:")
        for bad in totals.first_bad:
            print(f"  {printable(bad)}")
