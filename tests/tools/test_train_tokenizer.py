import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.errors import ConfigError, DataError
from megatron.tokenizer import load_tokenizer
from tools.train_tokenizer import main

ROOT = Path(__file__).parents[2]
TEXTS = [f"word{i % 37} and {i % 11} more, don't stop\n" * 3 for i in range(200)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def test_special_tokens_have_the_ids_of_bloom(tmp_path: Path, corpus: Path) -> None:
    output = tmp_path / "new" / "tokenizer.json"
    assert main(["--input", str(corpus), "--vocab_size", "300", "--output", str(output)]) == 0
    tokenizer = load_tokenizer(output)
    assert tokenizer.vocab_size == 300
    ids = [tokenizer.vocabulary[name] for name in ("<unk>", "<s>", "</s>", "<pad>")]
    assert ids == [0, 1, 2, 3]


def test_any_bytes_can_be_encoded(tmp_path: Path, corpus: Path) -> None:
    output = tmp_path / "tokenizer.json"
    main(["--input", str(corpus), "--vocab_size", "260", "--output", str(output)])
    tokenizer = load_tokenizer(output)
    text = "".join(map(chr, [*range(0x250), 0x4E2D, 0x1F600, 0x10FFFF]))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 0 not in ids


def test_words_keep_the_space_before_them(tmp_path: Path, corpus: Path) -> None:
    output = tmp_path / "tokenizer.json"
    main(["--input", str(corpus), "--vocab_size", "400", "--output", str(output)])
    tokenizer = load_tokenizer(output)
    parts = [tokenizer.decode([number]) for number in tokenizer.encode(" and more, stop")]
    assert parts == [" and", " more", ",", " stop"]


def test_same_input_gives_the_same_file(tmp_path: Path, corpus: Path) -> None:
    outputs = [tmp_path / "a.json", tmp_path / "b.json"]
    for output in outputs:
        # Two processes, because hashes differ from one to the next.
        script = [sys.executable, "-m", "tools.train_tokenizer", "--input", str(corpus)]
        arguments = ["--vocab_size", "400", "--output", str(output)]
        subprocess.run([*script, *arguments], cwd=ROOT, check=True)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_vocabulary_must_hold_all_bytes(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ConfigError, match="--vocab_size must be at least 260, got 259"):
        main(["--input", str(corpus), "--vocab_size", "259", "--output", str(tmp_path / "a.json")])


def test_fewer_tokens_than_asked_for_are_told(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.json"
    main(["--input", str(corpus), "--vocab_size", "90000", "--output", str(output)])
    found = load_tokenizer(output).vocab_size
    assert f"train with --model.vocab_size {found}\n" in capsys.readouterr().out


def test_a_tokenizer_that_is_there_is_kept(tmp_path: Path, corpus: Path) -> None:
    output = tmp_path / "tokenizer.json"
    output.write_text("mine")
    arguments = ["--input", str(corpus), "--vocab_size", "300", "--output", str(output)]
    with pytest.raises(ConfigError, match="--output: .*tokenizer.json exists already"):
        main(arguments)
    assert output.read_text() == "mine"
    assert main([*arguments, "--overwrite"]) == 0
    assert load_tokenizer(output).vocab_size == 300


def test_input_without_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text("bad\n")
    arguments = ["--vocab_size", "300", "--output", str(tmp_path / "a.json")]
    with pytest.raises(DataError, match="no text in the input"):
        main(["--input", str(tmp_path / "a.jsonl"), *arguments])
    assert capsys.readouterr().err == f"left out {tmp_path / 'a.jsonl'}:1: not JSON\n"
    assert not (tmp_path / "a.json").exists()
