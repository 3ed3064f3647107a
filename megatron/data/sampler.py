"""Which samples each data rank reads in a step.

A step reads the samples that follow those already consumed. They are cut into chunks of one
microbatch for each data rank, and rank r takes the r-th part of each chunk. With 2 data ranks,
microbatches of 2 and a global batch of 8, after 100 samples:

    rank 0    100 101           104 105
    rank 1            102 103           106 107

The number of consumed samples is all there is to remember: a run goes on from it with any number of
ranks and any microbatch, and every global batch stays the same set of samples.
"""


def microbatch_samples(
    consumed_samples: int, global_batch: int, micro_batch: int, rank: int, size: int
) -> list[range]:
    """The numbers of the samples that data rank ``rank`` of ``size`` reads in the next step.

    One range of ``micro_batch`` numbers for each microbatch.

    Raises:
        ValueError: if ``global_batch`` is not a multiple of ``micro_batch * size``.
    """
    chunk = micro_batch * size
    if global_batch % chunk != 0:
        raise ValueError(
            f"global batch {global_batch} must be a multiple of microbatch {micro_batch} x "
            f"{size} data ranks"
        )
    first = consumed_samples + rank * micro_batch
    return [
        range(start, start + micro_batch) for start in range(first, first + global_batch, chunk)
    ]
