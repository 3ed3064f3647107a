import json
from pathlib import Path

import pytest
import sentencepiece
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models

from megatron.commands.tokenizer import train_tokenizer
from megatron.errors import DataError, DiskError
from megatron.tokenizer import load_tokenizer

TEXTS = [
    "Hello world, don't 'quote' me .",
    "def f(x):\n\treturn x  # two  spaces\n",
    "gr\u00fc\u00dfe \u4e2d\u6587 \U0001f600 e\u0301",
    "",
    " ",
]
CORPUS = ["the quick brown fox jumps over the lazy dog", "def f(x):\n    return x\n"] * 3


def make_tokenizer_file(path: Path) -> Path:
    """A small byte-level tokenizer with BLOOM's special tokens."""
    path.write_text(train_tokenizer(CORPUS, 300).to_str())
    return path


def make_transformers_folder(folder: Path) -> Path:
    load_tokenizer(make_tokenizer_file(folder.with_suffix(".json"))).export_transformers(folder)
    return folder


def make_sentencepiece_file(path: Path) -> Path:
    corpus = path.with_suffix(".txt")
    corpus.write_text("\n".join(CORPUS) + "\n")
    sentencepiece.SentencePieceTrainer.Train(
        input=str(corpus),
        model_prefix=str(path.with_suffix("")),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return path


MAKERS = {
    "tokenizer.json": make_tokenizer_file,
    "folder": make_transformers_folder,
    "spm.model": make_sentencepiece_file,
}


@pytest.fixture(params=list(MAKERS))
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return MAKERS[request.param](tmp_path / request.param)


def test_decoding_gives_the_text_back(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(TEXTS)] == TEXTS


def test_batch_equals_its_texts(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_no_special_token_is_added(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("") == []
    assert tokenizer.eod_id not in tokenizer.encode("the dog")


def test_end_of_document_is_the_token_of_that_name(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    assert tokenizer.eod_id == 2
    assert tokenizer.vocabulary["</s>"] == 2


def test_vocab_size_counts_all_ids(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == len(tokenizer.vocabulary)
    assert sorted(tokenizer.vocabulary.values()) == list(range(tokenizer.vocab_size))


def test_saved_tokenizer_is_the_same(path: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(path)
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.eod_id == tokenizer.eod_id
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    saved = (tmp_path / "saved").rglob("*")
    assert {p.relative_to(tmp_path / "saved").as_posix() for p in saved} == set(tokenizer.files())


def test_fingerprint_is_that_of_the_vocabulary(tmp_path: Path) -> None:
    file = make_tokenizer_file(tmp_path / "a.json")
    folder = make_transformers_folder(tmp_path / "b")
    other = tmp_path / "c.json"
    other.write_text(train_tokenizer(CORPUS, 299).to_str())
    assert load_tokenizer(file).fingerprint == load_tokenizer(folder).fingerprint
    assert load_tokenizer(file).fingerprint != load_tokenizer(other).fingerprint


def test_added_token_counts(tmp_path: Path) -> None:
    backend = train_tokenizer(CORPUS, 300)
    backend.add_special_tokens(["<|extra|>"])
    (tmp_path / "a.json").write_text(backend.to_str())
    tokenizer = load_tokenizer(tmp_path / "a.json")
    assert tokenizer.vocab_size == 301
    assert tokenizer.encode("<|extra|>") == [300]


def test_truncation_set_in_the_file_is_ignored(tmp_path: Path) -> None:
    backend = train_tokenizer(CORPUS, 300)
    backend.enable_truncation(2)
    (tmp_path / "a.json").write_text(backend.to_str())
    assert len(load_tokenizer(tmp_path / "a.json").encode("a b c d e f g")) > 2


@pytest.mark.parametrize("with_model", [False, True])
def test_transformers_opens_the_export(tmp_path: Path, with_model: bool) -> None:
    tokenizer = load_tokenizer(make_tokenizer_file(tmp_path / "tokenizer.json"))
    tokenizer.export_transformers(tmp_path / "export")
    if with_model:
        (tmp_path / "export" / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "export", local_files_only=True)
    assert [opened(text)["input_ids"] for text in TEXTS] == tokenizer.encode_batch(TEXTS)
    assert [opened.decode(ids) for ids in tokenizer.encode_batch(TEXTS)] == TEXTS
    specials = (opened.unk_token, opened.bos_token, opened.eos_token, opened.pad_token)
    assert specials == ("<unk>", "<s>", "</s>", "<pad>")
    assert len(opened) == tokenizer.vocab_size


def test_export_of_sentencepiece_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_sentencepiece_file(tmp_path / "spm.model"))
    with pytest.raises(DataError, match="cannot be exported for transformers"):
        tokenizer.export_transformers(tmp_path / "export")


def test_tokenizer_without_end_of_document_is_refused(tmp_path: Path) -> None:
    Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "a.json"))
    tokenizer = load_tokenizer(tmp_path / "a.json")
    with pytest.raises(DataError) as caught:
        tokenizer.eod_id  # noqa: B018
    assert str(caught.value) == (
        f"{tmp_path / 'a.json'}: has no end-of-document token, which is one of "
        "</s>, <|endoftext|>, <|end_of_text|>, <eos>, <eod>"
    )


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_tokenizer(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_path_without_tokenizer_is_refused(tmp_path: Path) -> None:
    assert "no such tokenizer" in refusal(tmp_path / "missing.json")
    assert "is not a tokenizer; expected a .json or .model file" in refusal(tmp_path)
    (tmp_path / "a.txt").touch()
    assert "is not a tokenizer; expected a .json or .model file" in refusal(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.json", "a.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"garbage" * 100])
def test_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert "cannot be read as a tokenizer" in refusal(tmp_path / name)


def test_damaged_folder_is_refused(tmp_path: Path) -> None:
    folder = make_transformers_folder(tmp_path / "folder")
    (folder / "tokenizer.json").write_text("garbage")
    assert "cannot be read as a tokenizer" in refusal(folder)


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    canary = tmp_path / "canary"
    (folder / "code.py").write_text(f"open({str(canary)!r}, 'w')\nclass T: pass\n")
    config = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert "tokenizer_config.json: auto_map" in refusal(folder)
    assert not canary.exists()


def test_folder_that_cannot_be_written_is_a_disk_error(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer_file(tmp_path / "a.json"))
    with pytest.raises(DiskError, match="cannot be made: "):
        tokenizer.save(tmp_path / "a.json")
