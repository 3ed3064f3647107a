"""Whatever happens to a kept array, the samples are those of an undisturbed run, and it is told.

Files of all kinds are damaged in all ways that the program below knows: orders, blends and what is
known of the tokens.
"""

import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron.config import Config
from megatron.data.loader import build_samples
from tests.figures import Figure
from tests.megatron.data.test_loader import make_config
from tests.megatron.data.test_samples import make_dataset, random_documents

AT_ONCE = 60
CASES = 1500

Choose = random.Random
Damage = Callable[[Path, Choose], None]


def flip_bit(path: Path, choose: Choose) -> None:
    content = bytearray(path.read_bytes())
    content[choose.randrange(len(content))] ^= 1 << choose.randrange(8)
    path.write_bytes(content)


def flip_bit_of_header(path: Path, choose: Choose) -> None:
    content = bytearray(path.read_bytes())
    content[choose.randrange(128)] ^= 1 << choose.randrange(8)
    path.write_bytes(content)


def flip_bit_of_end(path: Path, choose: Choose) -> None:
    content = bytearray(path.read_bytes())
    content[-choose.randrange(1, 140)] ^= 1 << choose.randrange(8)
    path.write_bytes(content)


def cut(path: Path, choose: Choose) -> None:
    os.truncate(path, choose.randrange(path.stat().st_size))


def cut_to_the_array(path: Path, choose: Choose) -> None:
    """What versions wrote that kept no hashes."""
    np.save(path, np.load(path))


def extend(path: Path, choose: Choose) -> None:
    path.write_bytes(path.read_bytes() + choose.randbytes(choose.randrange(1, 5000)))


def insert(path: Path, choose: Choose) -> None:
    content = path.read_bytes()
    at = choose.randrange(len(content))
    path.write_bytes(content[:at] + b"\0" + content[at:])


def zero(path: Path, choose: Choose) -> None:
    """A block that a file system has lost."""
    content = bytearray(path.read_bytes())
    at = choose.randrange(128, len(content))
    content[at : at + 512] = bytes(len(content[at : at + 512]))
    path.write_bytes(content)


def change_array(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write another array before the same end."""
    array = np.load(path)
    with path.open("rb") as file:
        np.lib.format.read_array(file)
        end = file.read()
    with path.open("wb") as file:
        np.save(file, change(array))
        file.write(end)


def other_numbers(path: Path, choose: Choose) -> None:
    change_array(path, lambda array: np.roll(array, 1) + np.ones_like(array))


def other_shape(path: Path, choose: Choose) -> None:
    change_array(path, lambda array: array.reshape(*array.shape, 1))


def other_order(path: Path, choose: Choose) -> None:
    change_array(path, lambda array: np.asfortranarray(np.stack([array, array])))


def other_dtype(path: Path, choose: Choose) -> None:
    change_array(path, lambda array: array.view(f"i{array.itemsize}").astype(np.float32))


def object_array(path: Path, choose: Choose) -> None:
    np.save(path, np.array([{}, []], dtype=object), allow_pickle=True)


def archive(path: Path, choose: Choose) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.arange(9))


def swap(path: Path, choose: Choose) -> None:
    """The file of another set, or of another array."""
    shutil.copy(choose.choice([p for p in path.parent.glob("*.npy") if p != path]), path)


def remove(path: Path, choose: Choose) -> None:
    path.unlink()


def make_link(path: Path, choose: Choose) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


def dangling_link(path: Path, choose: Choose) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def pipe(path: Path, choose: Choose) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path, choose: Choose) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[Damage] = [
    *(flip_bit, flip_bit_of_header, flip_bit_of_end, cut, cut_to_the_array, extend, insert, zero),
    *(other_numbers, other_shape, other_order, other_dtype, object_array, archive, swap, remove),
    *(make_link, dangling_link, pipe, folder),
]


def is_still(path: Path, content: bytes) -> bool:
    """Whether a damage was none, as a swap of equal files."""
    return path.is_file() and not path.is_symlink() and path.read_bytes() == content


def tokens(config: Config) -> list[bytes]:
    samples = build_samples(config, "train", 60)
    return [samples[index].tobytes() for index in range(len(samples))]


@pytest.mark.parametrize(
    "first",
    [0, *(pytest.param(n, marks=pytest.mark.nightly) for n in range(AT_ONCE, CASES, AT_ONCE))],
)
def test_damaged_arrays_are_computed_anew(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    figure: Figure,
    first: int,
) -> None:
    monkeypatch.setattr("megatron.data.content._REST_SECONDS", -1.0)
    cache = tmp_path / "cache"
    for number, name in enumerate("ab"):
        make_dataset(tmp_path / name, random_documents(number, 40, 30))
    config = make_config(tmp_path, tmp_path / "a", tmp_path / "b", cache_folder=cache)
    undisturbed = tokens(config)
    names = sorted(path.name for path in cache.iterdir())
    assert len(names) == 2 * 3 + 2 * 2 + 2, "two orders, what is known of two datasets, a blend"
    silent = 0
    for number in range(first, first + AT_ONCE):
        choose = random.Random(number)
        # Every damage to every file, in turn.
        name = names[(number + number // len(DAMAGES)) % len(names)]
        before = (cache / name).read_bytes()
        DAMAGES[number % len(DAMAGES)](cache / name, choose)
        if is_still(cache / name, before):
            continue
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert tokens(config) == undisturbed, (number, name)
        silent += not any(name[:10] in message for message in caplog.messages)
        if (cache / name).is_dir():
            (cache / name).rmdir()
            assert tokens(config) == undisturbed
        assert not (cache / name).is_symlink()
        assert (cache / name).read_bytes() == before
    assert silent == 0
    figure("damaged caches", damages=len(DAMAGES), cases=AT_ONCE, silent=silent)
