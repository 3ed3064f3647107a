import json
from pathlib import Path

from megatron.commands.corpus import Document, choose, library_documents, main


def test_corpus_holds_sources_and_help_topics_once(tmp_path: Path) -> None:
    output = tmp_path / "new" / "corpus.jsonl"
    assert main(["--output", str(output), "--max_bytes", "3000000"]) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    sources = [record["source"] for record in records]
    texts = [record["text"] for record in records]
    assert all(set(record) == {"text", "source"} for record in records)
    assert any(source.endswith(".py") for source in sources)
    assert any(source.startswith("pydoc_data/topics/") for source in sources)
    assert len(set(texts)) == len(texts)
    assert 2_000_000 < sum(len(text.encode()) for text in texts) <= 3_000_000


def test_output_is_the_same_each_time(tmp_path: Path) -> None:
    for name in "ab":
        main(["--output", str(tmp_path / name), "--max_bytes", "1000000"])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tests_packages_and_other_encodings_are_left_out(tmp_path: Path) -> None:
    wanted = ["a.py", "sub/b.txt", "sub/README", "sub/c.rst"]
    unwanted = ["test/d.py", "sub/tests/e.py", "site-packages/f.py", "g.so", "sub/topics.pyc"]
    for name in [*wanted, *unwanted, "pydoc_data/topics.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    found = list(library_documents(tmp_path))
    assert sorted(document.source for document in found) == sorted(wanted)


def test_order_does_not_depend_on_the_order_of_discovery() -> None:
    documents = [Document(str(i), f"text {i}") for i in range(20)]
    chosen = list(choose(documents, None))
    assert chosen == list(choose(documents[::-1], None))
    assert chosen != documents
    assert sorted(chosen, key=lambda one: int(one.source)) == documents


def test_bytes_are_limited_and_duplicates_do_not_count() -> None:
    documents = [Document(str(i), "same text") for i in range(20)]
    assert len(list(choose(documents, 9))) == 1
    assert list(choose(documents, 8)) == []
