import pytest

from megatron.data.sampler import microbatch_samples


def test_ranks_take_neighbouring_parts_of_each_chunk() -> None:
    assert microbatch_samples(100, 8, 2, rank=0, size=2) == [range(100, 102), range(104, 106)]
    assert microbatch_samples(100, 8, 2, rank=1, size=2) == [range(102, 104), range(106, 108)]


@pytest.mark.parametrize(("micro_batch", "size"), [(1, 1), (1, 4), (2, 3), (4, 3), (12, 2)])
def test_global_batch_is_the_same_in_every_layout(micro_batch: int, size: int) -> None:
    read = [
        number
        for rank in range(size)
        for numbers in microbatch_samples(48, 24, micro_batch, rank, size)
        for number in numbers
    ]
    assert sorted(read) == list(range(48, 72))


def test_layout_may_change_between_steps() -> None:
    steps = [(0, 8, 2, 2), (8, 8, 1, 4), (16, 4, 4, 1)]
    read = [
        number
        for consumed, batch, micro_batch, size in steps
        for rank in range(size)
        for numbers in microbatch_samples(consumed, batch, micro_batch, rank, size)
        for number in numbers
    ]
    assert sorted(read) == list(range(20))


def test_uneven_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="global batch 6 must be a multiple of microbatch 2 x 2"):
        microbatch_samples(0, 6, 2, 0, 2)
