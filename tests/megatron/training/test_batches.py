"""Each rank gets its microbatches, and reads no data that another gives it."""

from pathlib import Path

import pytest

from megatron.data.loader import build_samples
from megatron.errors import DataError
from megatron.training.batches import BatchReader
from tests.distributed import run_ranks
from tests.megatron.data.test_samples import make_dataset, random_documents
from tests.megatron.training.sample import make_config, make_launch


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    make_dataset(tmp_path / "text", random_documents(1, 60, 30))
    return tmp_path / "text"


def read(prefix: Path, tensor: int, data: int, absent: int | None = None) -> list[list[list[int]]]:
    """The tokens of this rank's microbatches of eight samples; rank ``absent`` has no data."""
    launch = make_launch(tensor, data)
    path = prefix if launch.rank != absent else prefix.with_name("missing")
    config = make_config(prefix.parent, data={"paths": {str(path): 1.0}})
    reader = BatchReader(config, launch, "train", 32, eod_id=None)
    return [inputs.tokens.tolist() for inputs in reader.read(4, 8, micro_batch=2)]


def expected(prefix: Path) -> list[list[int]]:
    config = make_config(prefix.parent, data={"paths": {str(prefix): 1.0}})
    samples = build_samples(config, "train", 32)
    return [samples[number][:-1].tolist() for number in range(4, 12)]


def test_lone_rank_reads_the_samples_in_order(prefix: Path) -> None:
    (batches,) = run_ranks(1, read, prefix, 1, 1)
    assert [len(batch) for batch in batches] == [2, 2, 2, 2]
    assert sum(batches, []) == expected(prefix)


def test_tensor_ranks_share_what_the_first_one_reads(prefix: Path) -> None:
    first, second = run_ranks(2, read, prefix, 2, 1, 1)
    assert first == second
    assert sum(first, []) == expected(prefix)


def test_data_ranks_take_turns(prefix: Path) -> None:
    first, second = run_ranks(2, read, prefix, 1, 2)
    assert [len(batch) for batch in first + second] == [2, 2, 2, 2]
    turns = [batch for pair in zip(first, second, strict=True) for batch in pair]
    assert sum(turns, []) == expected(prefix)


def open_nothing(prefix: Path, num_samples: int) -> str:
    config = make_config(prefix.parent, data={"paths": {str(prefix): 1.0}, "split": (1, 0, 0)})
    try:
        BatchReader(config, make_launch(), "valid", num_samples, eod_id=None)
    except DataError as error:
        return str(error)
    return "opened"


def test_split_may_be_empty_if_nothing_is_read_of_it(prefix: Path) -> None:
    assert run_ranks(1, open_nothing, prefix, 0) == ["opened"]
    assert "leaves none of its 60 documents for valid" in run_ranks(1, open_nothing, prefix, 2)[0]
