"""What is wrong with the data is found out once for the ranks of a node, and is the same for all.

Nodes are folders here: each rank is in that of its node, and the paths of the data are relative.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron.config import Config
from megatron.data import blend, cache, content
from megatron.data.content import Findings
from megatron.data.history import Phase
from megatron.data.loader import build_samples
from megatron.data.samples import SampleOrder
from megatron.errors import DataError
from megatron.training import findings
from megatron.training.findings import compare_findings, find_orders, read_data
from tests.distributed import preload, run_ranks
from tests.megatron.data.test_loader import make_config
from tests.megatron.data.test_samples import make_dataset, random_documents

NAMES = ("a", "b", "c")

preload(__name__)


def make_node(folder: Path, kept_in: str = "cache") -> Path:
    """A node with the data, where ``cache``, as ``kept_in`` says, can be made or not."""
    folder.mkdir(parents=True)
    for number, name in enumerate(NAMES):
        make_dataset(folder / name, random_documents(number, 40, 30))
    if kept_in == "file":
        (folder / "cache").touch()
    return folder


def config_of(*names: str) -> Config:
    return make_config(Path("."), *map(Path, names), cache_folder=Path("cache"))


@dataclass(frozen=True)
class Place:
    """Where a rank is: the name of its machine, and the disk that it sees there."""

    machine: str
    disk: Path
    reads: bool = True


@dataclass(frozen=True)
class Start:
    """How a start ended on a rank: what it had to do, and the samples that it reads."""

    counts: dict[str, int]
    samples: list[list[int]] | None
    error: str = ""


def start(places: Sequence[Place], at_rest: bool) -> Start:
    """Begin as a run does."""
    place, group = places[dist.get_rank()], dist.group.WORLD
    os.chdir(place.disk)
    counts = count_work()
    setattr(findings, "_node", lambda: place.machine)  # noqa: B010
    setattr(content, "_REST_SECONDS", -1.0 if at_rest else 60.0)  # noqa: B010
    config, needed = config_of(*NAMES), {"train": [Phase(0, 8, 60)]}
    samples = None
    try:
        found = read_data(config, reads=place.reads, group=group)
        found = find_orders(config, needed, found, reads=place.reads, group=group)  # type: ignore[arg-type]
        if place.reads:
            built = build_samples(config, "train", 60, found)
            samples = [built[index].tolist() for index in range(60)]
        compare_findings(found, group)
    except DataError as error:
        return Start(counts, samples, str(error))
    return Start(counts, samples)


def run(*places: Place, at_rest: bool = False) -> list[Start]:
    return run_ranks(len(places), start, places, at_rest)


def work(starts: Sequence[Start], what: str) -> list[int]:
    return [one.counts[what] for one in starts]


def count_work() -> dict[str, int]:
    counts = {"tokens": 0, "orders": 0, "blends": 0, "verified": 0}

    def counted(module: Any, name: str, what: str) -> None:
        original = getattr(module, name)

        def function(*args: Any, **options: Any) -> Any:
            counts[what] += 1
            return original(*args, **options)

        setattr(module, name, function)

    counted(content, "read_content", "tokens")
    counted(SampleOrder, "build", "orders")
    counted(blend, "blend", "blends")
    counted(cache, "hash_file", "verified")
    return counts


def test_first_rank_of_each_node_works_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Place("one", make_node(tmp_path / "1"))
    two = Place("two", make_node(tmp_path / "2"))
    first = run(one, one, two, two)
    assert work(first, "tokens") == work(first, "orders") == [3, 0, 3, 0]
    assert work(first, "blends") == [1, 0, 1, 0]
    # The next start verifies what it finds, and computes nothing.
    again = run(one, one, two, two)
    assert work(again, "orders") == work(again, "blends") == [0] * 4
    assert [number > 0 for number in work(again, "verified")] == [True, False, True, False]
    monkeypatch.chdir(one.disk)
    alone = build_samples(config_of(*NAMES), "train", 60)
    samples = [alone[index].tolist() for index in range(60)]
    assert all(one_of.samples == samples for one_of in (*first, *again))


def test_disk_of_all_nodes_is_read_once(tmp_path: Path) -> None:
    disk = make_node(tmp_path / "1")
    starts = run(*(Place(name, disk) for name in ("one", "two", "three")), at_rest=True)
    assert work(starts, "tokens") == [1, 1, 1], "each a share"
    assert work(starts, "orders") == [3, 0, 0]
    assert work(starts, "blends") == [1, 0, 0]


def test_what_cannot_be_kept_is_sent(tmp_path: Path) -> None:
    one = Place("one", make_node(tmp_path / "1", "file"))
    two = Place("two", make_node(tmp_path / "2", "file"))
    starts = run(one, one, two, two)
    assert work(starts, "tokens") == [3, 0, 3, 0]
    assert work(starts, "orders") == [3, 0, 0, 0]
    assert work(starts, "blends") == [1, 0, 0, 0]
    (kept,) = run(Place("three", make_node(tmp_path / "3")))
    assert all(one_of.samples == kept.samples for one_of in starts)


def test_ranks_that_read_nothing_need_no_data(tmp_path: Path) -> None:
    node = Place("one", make_node(tmp_path / "1"))
    (tmp_path / "2").mkdir()
    starts = run(node, Place("two", tmp_path / "2", reads=False), node)
    assert work(starts, "tokens") == [3, 0, 0]
    assert [one.error for one in starts] == [""] * 3


def change_token(node: Path) -> None:
    with (node / "b.bin").open("r+b") as file:
        file.seek(40)
        file.write(b"\1")


def change_lengths(node: Path) -> None:
    documents = random_documents(1, 40, 30)
    documents[1], documents[2] = documents[1] + documents[2], []
    make_dataset(node / "b", documents)


@pytest.mark.parametrize(("change", "machine"), [(change_token, "one"), (change_lengths, "two")])
def test_rank_with_other_data_is_refused(
    tmp_path: Path, change: Callable[[Path], None], machine: str
) -> None:
    """On another machine, or as containers of one machine may see other disks."""
    one, two = make_node(tmp_path / "1"), make_node(tmp_path / "2")
    change(two)
    starts = run(Place("one", one), Place(machine, two))
    (message,) = {start.error for start in starts}
    assert message.startswith(("b.bin: the hash of the content is ", "b.idx: the fingerprint is "))
    assert "on rank 1 (host " in message
    assert "all ranks must read the same data" in message


def test_damaged_orders_of_another_disk_of_the_machine_are_not_used(tmp_path: Path) -> None:
    one, two = (Place("one", make_node(tmp_path / name)) for name in "12")
    run(one), run(two)
    for path in (two.disk / "cache").iterdir():
        numbers = bytearray(path.read_bytes())
        numbers[len(numbers) // 2] ^= 1
        path.write_bytes(numbers)
    first, second = run(one, two)
    assert first.error == second.error == ""
    assert first.samples == second.samples
    assert second.counts["orders"] == 3


def other_order(_: Path) -> str:
    found = Findings()
    found.cache.digests["a-0123"] = f"{dist.get_rank() // 2}"
    try:
        compare_findings(found, dist.group.WORLD)
    except DataError as error:
        return str(error)
    return "not refused"


def test_other_order_is_refused(tmp_path: Path) -> None:
    results = run_ranks(3, other_order, tmp_path)
    assert len(set(results)) == 1
    assert results[0].startswith("the hash of the order a-0123 is 1 on rank 2 (host ")


def test_token_outside_the_vocabulary_is_found_by_one_and_told_by_all(tmp_path: Path) -> None:
    node = Place("one", make_node(tmp_path / "1"))
    make_dataset(node.disk / "c", [[1] * 50, [5, 60000]])
    first, second = run(node, node)
    assert first.error == second.error
    assert first.error.startswith("c.bin: has the token id 60000 at byte 204 (document 1, token 1")
