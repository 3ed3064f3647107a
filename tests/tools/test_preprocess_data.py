import gzip
import json
from pathlib import Path

import pytest

from megatron.commands import prepare
from megatron.commands.prepare import Encoding, cut_batches, encode_batch, main
from megatron.data.content import read_content
from megatron.data.corpus import Record
from megatron.data.description import read_description
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.text_bytes import read_text_bytes
from megatron.errors import ConfigError, DataError
from megatron.tokenizer import Tokenizer, load_tokenizer
from tests.megatron.data import reference
from tests.megatron.test_tokenizer import make_tokenizer_file

TEXTS = ["the quick brown fox", "gr\u00fc\u00dfe \u4e2d\u6587\n\n  end", "dog", "x" * 3000, " a "]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(make_tokenizer_file(tmp_path / "tokenizer.json"))


def write_lines(path: Path, lines: list[bytes]) -> Path:
    content = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def json_lines(texts: list[str], key: str = "text") -> list[bytes]:
    return [json.dumps({key: text, "other": 1}).encode() for text in texts]


def run(tokenizer: Tokenizer, *inputs: Path, options: tuple[str, ...] = ()) -> Path:
    """Run the tool and return the prefix of its output."""
    prefix = tokenizer.path.parent / "out" / "data.v1"
    names = [str(path) for path in inputs]
    arguments = ["--tokenizer", str(tokenizer.path), "--output", str(prefix), *options]
    arguments.append("--overwrite")
    assert main(["--input", *names, *arguments]) == 0
    return prefix


def assert_holds(prefix: Path, documents: list[list[int]]) -> None:
    assert Path(f"{prefix}.bin").read_bytes() == reference.bin_bytes(documents, "uint16")
    assert Path(f"{prefix}.idx").read_bytes() == reference.idx_bytes(documents, "uint16")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_lines_become_documents_with_their_end(
    tmp_path: Path, tokenizer: Tokenizer, name: str
) -> None:
    prefix = run(tokenizer, write_lines(tmp_path / name, json_lines(TEXTS)))
    documents = [[*ids, 2] for ids in tokenizer.encode_batch(TEXTS)]
    assert_holds(prefix, documents)

    description = read_description(prefix)
    assert description is not None
    assert description.dataset == IndexedDataset(prefix).fingerprint
    assert description.tokenizer == tokenizer.fingerprint
    assert description.vocab_size == 300
    assert description.largest_token == max(map(max, documents))
    assert description.documents == len(TEXTS)
    assert description.tokens == sum(map(len, documents))
    assert description.utf8_bytes == sum(len(text.encode()) for text in TEXTS)
    dataset = IndexedDataset(prefix)
    assert description.content == read_content(dataset)[0]
    lengths = read_text_bytes(dataset)
    assert lengths is not None
    assert lengths.tolist() == [len(text.encode()) for text in TEXTS]


def test_end_of_document_and_key_are_options(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_lines(tmp_path / "a.jsonl", json_lines(TEXTS, "content"))
    prefix = run(tokenizer, path, options=("--no-append_eod", "--json_key", "content"))
    assert_holds(prefix, tokenizer.encode_batch(TEXTS))


def test_folder_and_text_files_are_read_in_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text(TEXTS[1])
    (folder / "sub" / "c.txt").write_text(TEXTS[2])
    (folder / "ignored.csv").write_text("1,2")
    write_lines(folder / "a.jsonl", json_lines(TEXTS[3:]))
    (tmp_path / "first.txt").write_text(TEXTS[0])
    prefix = run(tokenizer, tmp_path / "first.txt", folder)
    expected = [TEXTS[0], *TEXTS[3:], TEXTS[1], TEXTS[2]]
    assert_holds(prefix, [[*ids, 2] for ids in tokenizer.encode_batch(expected)])


def test_output_does_not_depend_on_the_number_of_workers(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small batches, so that many are on their way at once.
    monkeypatch.setattr(prepare, "BATCH_BYTES", 100)
    texts = [f"{i} " + TEXTS[i % len(TEXTS)] * (i % 7) for i in range(200)]
    path = write_lines(tmp_path / "a.jsonl", json_lines(texts))
    outputs = []
    for workers in ("1", "3"):
        prefix = run(tokenizer, path, options=("--workers", workers))
        outputs.append([Path(f"{prefix}.{s}").read_bytes() for s in ("bin", "idx", "json")])
    assert outputs[0] == outputs[1]
    assert_holds(prefix, [[*ids, 2] for ids in tokenizer.encode_batch(texts)])


def test_bad_lines_are_counted_and_told(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json_lines(["the dog"])[0]
    bad = [
        (b'{"text": "a', "not JSON"),
        (b'{"other": "a"}', "no key 'text'"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"", "empty"),
        (b'{"text": 5}', "'text' is not text"),
        (b'{"text": " "}', "empty"),
        (b'["text"]', "no key 'text'"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "\\ud800"}', "'text' is not Unicode text"),
    ]
    path = tmp_path / "a.jsonl"
    for line, reason in bad:
        prefix = run(tokenizer, write_lines(path, [good, line, good]))
        assert_holds(prefix, [[*tokenizer.encode("the dog"), 2]] * 2)
        assert f"left out 1 bad records, first of them:\n  {path}:2: {reason}\n" in (
            capsys.readouterr().out
        )


def test_first_bad_lines_are_shown(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*json_lines(["dog"]), *[b"bad"] * 9])
    run(tokenizer, path)
    shown = "".join(f"  {path}:{number}: not JSON\n" for number in range(2, 7))
    assert capsys.readouterr().out.endswith(f"left out 9 bad records, first of them:\n{shown}")


def test_batch_of_bad_records_alone_is_empty(tokenizer: Tokenizer) -> None:
    batch = encode_batch(Encoding(tokenizer.path, "text", True), [Record("a:1", b"bad", True)])
    assert batch.documents == []
    assert batch.bad == ["a:1: not JSON"]


def test_byte_order_mark_is_dropped() -> None:
    assert Record("a", b"\xef\xbb\xbfdog", False).text("text") == "dog"
    assert Record("a:1", b'\xef\xbb\xbf{"text": "dog"}', True).text("text") == "dog"


def test_batches_keep_all_records_in_order() -> None:
    size = prepare.BATCH_BYTES // 3
    records = [Record(str(i), b"x" * size, False) for i in range(10)]
    batches = list(cut_batches(records))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert [record for batch in batches for record in batch] == records


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file or folder"),
        ("a.csv", b"1", "is of an unknown type; expected .txt, .jsonl, .jsonl.gz"),
        ("a.jsonl.gz", b"garbage", "cannot be read: Not a gzipped file"),
        (
            "a.jsonl.gz",
            gzip.compress(b"x" * 100, mtime=0)[:-4],
            "cannot be read: Compressed file ended",
        ),
        ("a.jsonl", b"bad\n", "no text in the input: 1 bad records"),
        ("a.jsonl", b"", "no text in the input: 0 bad records"),
    ],
)
def test_unusable_input_is_refused_and_writes_nothing(
    tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        run(tokenizer, path)
    assert message in str(caught.value)
    assert [p for p in (tmp_path / "out").glob("*") if p.is_file()] == []


def test_folder_without_text_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no files in this folder"):
        run(tokenizer, tmp_path / "empty")


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".bytes", ".json"])
def test_files_that_are_there_are_kept(tmp_path: Path, tokenizer: Tokenizer, suffix: str) -> None:
    there = tmp_path / f"data{suffix}"
    there.write_text("mine")
    arguments = ["--tokenizer", str(tokenizer.path), "--output", str(tmp_path / "data")]
    with pytest.raises(ConfigError, match=f"--output: .*data{suffix} exists already"):
        main(["--input", str(tmp_path / "not read"), *arguments])
    assert there.read_text() == "mine"


def test_number_of_workers_is_checked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="--workers must be at least 1, got 0"):
        run(tokenizer, tmp_path / "a.jsonl", options=("--workers", "0"))
