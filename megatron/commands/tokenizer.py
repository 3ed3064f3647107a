"""Train a byte-level BPE tokenizer of BLOOM's kind on a small corpus.

    bloom tokenizer --input corpus.jsonl --vocab_size 8192 --output tokenizer.json

Text is cut into words, spaces going with the word that follows, and bytes are merged inside words
only. Every byte is a token, so that any text can be encoded and nothing is lost. The special tokens
are BLOOM's, with BLOOM's ids: <unk> 0, <s> 1, </s> 2, <pad> 3. The same input gives the same file.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron.atomic import atomic_write, make_folder
from megatron.commands.arguments import CommandParser, add_overwrite, check_output
from megatron.commands.progress import Progress, bytes_to_read
from megatron.data.corpus import SUFFIXES, BadRecordError, Record, find_files, read_records
from megatron.errors import DataError, printable

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]
SMALLEST_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

# A word of anything but spaces and punctuation, a run of punctuation, or a run of spaces that no
# word takes along.
WORD = r" ?[^\s\p{P}\p{S}]+| ?[\p{P}\p{S}]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most ``vocab_size`` tokens, trained on ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        # That of the merges, which follow the reading.
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def read_texts(records: Iterable[Record], json_key: str, progress: Progress) -> Iterator[str]:
    """The texts of all records that hold one; ``progress`` is told of each record.

    Raises:
        DataError: if none does.
    """
    found = read = 0
    for record in records:
        read += len(record.content)
        progress.update(read)
        try:
            text = record.text(json_key)
        except BadRecordError as error:
            print(printable(f"left out {record.place}: {error}"), file=sys.stderr)
            continue
        found += 1
        yield text
    progress.close()
    if found == 0:
        raise DataError("no text in the input")


def build_parser() -> CommandParser:
    """The command line."""
    parser = CommandParser(
        "tokenizer",
        "Train a byte-level BPE tokenizer of BLOOM's kind on a small corpus.",
        ["bloom tokenizer --input text/ --vocab_size 32000 --output tokenizer.json"],
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
        "--vocab_size", type=int, required=True, help="number of tokens, special ones included"
    )
    parser.add_argument("--output", type=Path, required=True, help="the .json file to write")
    add_overwrite(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Train the tokenizer that the command line asks for; return the exit code."""
    parser = build_parser()
    args = parser.parse(argv)
    if args.vocab_size < SMALLEST_VOCAB_SIZE:
        parser.error(f"--vocab_size must be at least {SMALLEST_VOCAB_SIZE}, got {args.vocab_size}")
    check_output(args, "--output", [args.output])
    files = find_files(args.input)
    texts = read_texts(read_records(files), args.json_key, Progress(bytes_to_read(files)))
    tokenizer = train_tokenizer(texts, args.vocab_size)
    make_folder(args.output.parent)
    with atomic_write(args.output) as file:
        file.write(tokenizer.to_str(pretty=True).encode())
    found = tokenizer.get_vocab_size()
    print(f"wrote {args.output} with {found} tokens")
    if found < args.vocab_size:
        print(
            f"the text has no more words to merge than that; train with --model.vocab_size {found}"
        )
    return 0
