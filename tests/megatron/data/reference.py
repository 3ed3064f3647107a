"""The file format and the order of samples once more, in plain Python, for comparison.

Written from the description of the format and of the algorithm, one value at a time.
"""

import struct
from collections.abc import Sequence

import numpy as np

CODES = {"uint8": (1, "B"), "int32": (4, "i"), "int64": (5, "q"), "uint16": (8, "H")}


def bin_bytes(documents: Sequence[Sequence[int]], dtype: str) -> bytes:
    """The .bin file that holds ``documents``."""
    letter = CODES[dtype][1]
    return b"".join(struct.pack("<" + letter, token) for ids in documents for token in ids)


def idx_bytes(documents: Sequence[Sequence[int]], dtype: str) -> bytes:
    """The .idx file of ``documents``, each of them one sequence."""
    code, letter = CODES[dtype]
    content = b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, code)
    content += struct.pack("<QQ", len(documents), len(documents) + 1)
    for ids in documents:
        content += struct.pack("<i", len(ids))
    offset = 0
    for ids in documents:
        content += struct.pack("<q", offset)
        offset += len(ids) * struct.calcsize(letter)
    for boundary in range(len(documents) + 1):
        content += struct.pack("<q", boundary)
    return content


def count_epochs(tokens: int, num_samples: int, seq_length: int) -> int:
    """Passes over the documents until there are enough samples."""
    epochs = 1
    while (epochs * tokens - 1) // seq_length < num_samples:
        epochs += 1
    return epochs


def is_last_epoch_apart(tokens: int, num_samples: int, seq_length: int) -> bool:
    """Whether the last epoch is shuffled by itself."""
    epochs = count_epochs(tokens, num_samples, seq_length)
    if epochs == 1:
        return False
    before = ((epochs - 1) * tokens - 1) // seq_length
    return num_samples - before < int(0.95 * ((tokens - 1) // seq_length))


def gpt_samples(
    documents: Sequence[Sequence[int]], first: int, num_samples: int, seq_length: int, seed: int
) -> list[list[int]]:
    """All samples of ``documents``, in order; ``first`` is the number of the first document."""
    tokens = sum(len(ids) for ids in documents)
    epochs = count_epochs(tokens, num_samples, seq_length)
    apart = is_last_epoch_apart(tokens, num_samples, seq_length)
    random = np.random.RandomState(seed)
    numbers = [first + i for i in range(len(documents))]
    order = _shuffled(numbers * (epochs - 1 if apart else epochs), random)
    if apart:
        order += _shuffled(numbers, random)

    # The order of documents must come before that of samples, as both draw from one generator.
    total = (epochs * tokens - 1) // seq_length
    together = ((epochs - 1) * tokens - 1) // seq_length if apart else total
    shuffled = _shuffled(list(range(together)), random)
    if apart:
        shuffled += _shuffled(list(range(together, total)), random)

    stream = [token for number in order for token in documents[number - first]]
    return [stream[k * seq_length : k * seq_length + seq_length + 1] for k in shuffled]


def _shuffled(numbers: list[int], random: np.random.RandomState) -> list[int]:
    array = np.array(numbers, dtype=np.int32)
    random.shuffle(array)
    return [int(number) for number in array]


def sample_starts(sizes: Sequence[int], num_samples: int, seq_length: int) -> list[list[int]]:
    """Where samples begin in documents of ``sizes``: walk on by a sample, step back one token."""
    starts = [[0, 0]]
    entry, offset = 0, 0
    for _ in range(num_samples):
        missing = seq_length + 1
        while missing > 0:
            available = sizes[entry] - offset
            if available >= missing:
                offset += missing - 1
                missing = 0
            else:
                missing -= available
                entry += 1
                offset = 0
        starts.append([entry, offset])
    return starts


def blend(weights: Sequence[float], num_samples: int) -> tuple[list[int], list[int]]:
    """Dataset and sample of each position of a blend."""
    total = np.sum(np.array(weights, dtype=np.float64))
    shares = [float(weight / total) for weight in weights]
    counts = [0] * len(shares)
    datasets, samples = [], []
    for position in range(num_samples):
        best, best_error = 0, shares[0] * max(float(position), 1.0) - counts[0]
        for k in range(1, len(shares)):
            error = shares[k] * max(float(position), 1.0) - counts[k]
            if error > best_error:
                best, best_error = k, error
        datasets.append(best)
        samples.append(counts[best])
        counts[best] += 1
    return datasets, samples
