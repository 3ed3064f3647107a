"""Any layout reads any save, bit for bit; a damaged or hostile save is refused before any use."""

import os
import pickle
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.folders import find_latest
from megatron.checkpoint.format import MANIFEST
from megatron.checkpoint.load import open_checkpoint
from megatron.errors import CheckpointError
from megatron.hashing import hash_file
from mpu import ShardedTensor
from mpu.sharding import Box
from tests.distributed import run_ranks
from tests.megatron.checkpoint.sample import (
    FILES,
    PADDING,
    LocalTensors,
    edit_manifest,
    local_state,
    local_tensors,
    read_fields,
    save,
    specs,
    states_of,
    whole,
    world,
)

SIZES = [1, 2, 4]
FILE = "rank-00000.safetensors"


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By tensor size, the sample state saved at that size. Tests do not change it."""
    folder = tmp_path_factory.mktemp("saves")
    return {size: run_ranks(size, save, folder / str(size))[0] for size in SIZES}


@pytest.fixture
def saved(saves: dict[int, Path], tmp_path: Path) -> Path:
    """A copy of the save of two ranks, to be damaged."""
    return Path(shutil.copytree(saves[2], tmp_path / saves[2].name))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(got: LocalTensors, want: LocalTensors) -> None:
    assert got.keys() == want.keys()
    assert [key for key in want if bits(got[key]) != bits(want[key])] == []


@pytest.mark.parametrize("size", SIZES)
def test_every_layout_reads_every_save_bit_for_bit(saves: dict[int, Path], size: int) -> None:
    run_ranks(size, check_reads_every_save, list(saves.values()))


def check_reads_every_save(paths: Sequence[Path]) -> None:
    group = world()
    assert group is not None
    rank, size = group.rank(), group.size()
    want = local_tensors(rank, size, filled=True)
    for path in paths:
        got = local_tensors(rank, size, filled=False)
        open_checkpoint(path, group=group).read_into(states_of(got, rank, size))
        # Padding included, which reading leaves as it was.
        assert_same_bits(got, want)


@pytest.mark.parametrize("size", SIZES)
def test_whole_tensors_are_read_without_a_group(saves: dict[int, Path], size: int) -> None:
    reader = open_checkpoint(saves[size])
    assert len(reader.tensors) == 3 * len(specs(size))
    for kind, name in reader.tensors:
        want = whole(kind, name, specs(size)[name].shape)
        got = reader.read(kind, name)
        assert got.dtype == want.dtype
        assert bits(got) == bits(want)


def test_state_config_layout_and_files_come_back(saves: dict[int, Path]) -> None:
    reader = open_checkpoint(saves[2])
    assert reader.state == {"step": 100, "consumed_samples": 800}
    assert reader.config == {"model": {"num_layers": 2, "init_std": None}}
    assert reader.layout == {"tensor": 2}
    assert {name: reader.file(name) for name in reader.files} == FILES


def test_replicated_tensors_are_stored_once(saves: dict[int, Path]) -> None:
    reader = open_checkpoint(saves[4])
    assert [box.file for box in reader.tensors["weight", "norm"].boxes] == [FILE]
    assert len(reader.tensors["weight", "column"].boxes) == 4
    assert len(reader.tensors["weight", "gated"].boxes) == 8
    assert len(reader.tensors["weight", "vocabulary"].boxes) == 2


def test_parameters_that_require_gradients_are_filled(saves: dict[int, Path]) -> None:
    empty = local_tensors(0, 1, filled=False)
    parameters: LocalTensors = {key: torch.nn.Parameter(empty[key]) for key in empty}
    open_checkpoint(saves[2]).read_into(states_of(parameters, 0, 1))
    assert_same_bits(parameters, local_tensors(0, 1, filled=True))


def local_weights(rank: int, size: int, dtype: torch.dtype, *, filled: bool) -> LocalTensors:
    """The weights of the sample state alone, as ``dtype``."""
    tensors = local_tensors(rank, size, filled=filled)
    return {key: tensor.to(dtype) for key, tensor in tensors.items() if key[0] == "weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_alone_are_read_and_rounded(saves: dict[int, Path], dtype: torch.dtype) -> None:
    for path in saves.values():
        got = local_weights(1, 2, dtype, filled=False)
        open_checkpoint(path).read_weights_into(states_of(got, 1, 2))
        assert_same_bits(got, local_weights(1, 2, dtype, filled=True))


def test_weights_of_another_model_are_refused(saves: dict[int, Path]) -> None:
    weights = local_weights(0, 1, torch.float32, filled=False)
    first, *others = states_of(weights, 0, 1)
    reader = open_checkpoint(saves[2])
    with pytest.raises(CheckpointError, match="Missing in the model: weight of column$"):
        reader.read_weights_into(others)
    with pytest.raises(CheckpointError, match="Missing in the checkpoint: weight of new"):
        reader.read_weights_into([replace(first, name="new"), *others])
    with pytest.raises(CheckpointError, match=r"but the model's is float32 of shape \(9, 6\)"):
        reader.read_weights_into([replace(first, shape=(9, 6)), *others])
    assert all((weight == PADDING).all() for weight in weights.values())


def read_as(path: Path, targets: list[ShardedTensor]) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path).read_into(targets)
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


def test_missing_and_unexpected_tensors_are_both_named(saves: dict[int, Path]) -> None:
    first, second, *others = local_state(0, 1, filled=False)
    message = read_as(saves[1], [replace(first, name="new"), second, *others])
    assert "Missing in the checkpoint: weight of new\n" in message
    assert message.endswith("Missing in the model: weight of column")


def test_five_missing_tensors_are_named_and_the_others_counted(saves: dict[int, Path]) -> None:
    message = read_as(saves[1], [])
    assert "Missing in the checkpoint: nothing" in message
    assert "exp_avg of column, exp_avg of gated" in message
    assert message.endswith(" and 13 more")


def test_tensor_of_another_shape_is_refused(saves: dict[int, Path]) -> None:
    first, *others = local_state(0, 1, filled=False)
    message = read_as(saves[1], [replace(first, shape=(8, 7)), *others])
    assert "weight of column is float32 of shape (8, 6), but the model's is float32" in message
    assert message.endswith("of shape (8, 7)")


def test_tensor_of_another_dtype_is_refused(saves: dict[int, Path]) -> None:
    first, *others = local_state(0, 1, filled=False)
    boxes = tuple(Box(box.start, box.tensor.double()) for box in first.boxes)
    message = read_as(saves[1], [replace(first, boxes=boxes), *others])
    assert "weight of column is float32 of shape (8, 6), but the model's is float64" in message


def test_mismatch_on_one_rank_is_raised_on_all(saves: dict[int, Path]) -> None:
    messages = run_ranks(2, read_with_one_wrong_rank, saves[1])
    assert messages[0] == messages[1]
    assert "weight of column" in messages[0]


def read_with_one_wrong_rank(path: Path) -> str:
    group = world()
    assert group is not None
    first, *others = local_state(group.rank(), 2, filled=False)
    targets = [replace(first, shape=(8, 7)) if group.rank() == 1 else first, *others]
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, group=group).read_into(targets)
    return str(caught.value)


def test_unknown_tensor_or_file_is_refused(saves: dict[int, Path]) -> None:
    reader = open_checkpoint(saves[1])
    with pytest.raises(CheckpointError, match="holds no weight of 'nothing'"):
        reader.read("weight", "nothing")
    # The tensors' files and the manifest are not the caller's.
    for name in ("nothing", FILE, MANIFEST, "../../x"):
        with pytest.raises(CheckpointError, match="holds no file"):
            reader.file(name)


def test_missing_checkpoint_names_those_that_are_there(saves: dict[int, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"step-00000007.*missing.*\n.*: step-00000100$"):
        open_checkpoint(saves[1].parent / "step-00000007")


def test_empty_folder_is_refused_and_names_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"valid checkpoints in .*: none$"):
        open_checkpoint(tmp_path)


def test_fifty_flipped_bits_in_all_files_are_all_refused(saved: Path) -> None:
    files = [saved / name for name in [*read_fields(saved)["files"], MANIFEST]]
    files = [path for path in files if path.stat().st_size > 0]
    generator = random.Random(0)
    for index in range(50):
        path = files[index % len(files)]
        intact = path.read_bytes()
        bit = generator.randrange(8 * len(intact))
        damaged = bytearray(intact)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=path.name):
            open_checkpoint(saved)
        path.write_bytes(intact)
    open_checkpoint(saved)


def truncate(path: Path) -> None:
    os.truncate(path / FILE, (path / FILE).stat().st_size - 1)


def lengthen(path: Path) -> None:
    with (path / FILE).open("ab") as file:
        file.write(b"\0")


def delete(path: Path) -> None:
    (path / FILE).unlink()


def swap(path: Path) -> None:
    other = path / "rank-00001.safetensors"
    other.rename(path / "kept")
    (path / FILE).rename(other)
    (path / "kept").rename(path / FILE)


def fill_with_zeros(path: Path) -> None:
    (path / FILE).write_bytes(bytes((path / FILE).stat().st_size))


def link_out(path: Path) -> None:
    outside = path.parent / "outside"
    (path / FILE).rename(outside)
    (path / FILE).symlink_to(outside)


def link_to_itself(path: Path) -> None:
    (path / FILE).unlink()
    (path / FILE).symlink_to(path / FILE)


def replace_by_pipe(path: Path) -> None:
    (path / FILE).unlink()
    os.mkfifo(path / FILE)


@pytest.mark.parametrize(
    "damage",
    [truncate, lengthen, delete, swap, fill_with_zeros, link_out, link_to_itself, replace_by_pipe],
)
def test_damaged_file_is_refused(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=FILE):
        open_checkpoint(saved)


def test_all_damaged_files_are_counted(saved: Path) -> None:
    swap(saved)
    with pytest.raises(CheckpointError, match=r"\(other damaged files: 1\)$"):
        open_checkpoint(saved)


@pytest.mark.parametrize("damage", [truncate, delete, link_out])
def test_damage_that_costs_no_hash_is_refused_without_verification(
    saved: Path, damage: Callable[[Path], None]
) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=FILE):
        open_checkpoint(saved, verify=False)


def test_every_rank_refuses_with_the_same_message(saved: Path) -> None:
    swap(saved)
    messages = run_ranks(2, refusal, saved)
    assert messages[0] == messages[1]
    assert "(other damaged files: 1)" in messages[0]


def test_every_rank_refuses_a_damaged_manifest(saved: Path) -> None:
    (saved / MANIFEST).write_bytes(b"{}")
    messages = run_ranks(2, refusal, saved)
    assert messages[0] == messages[1]
    assert MANIFEST in messages[0]


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, group=world())
    return str(caught.value)


class Payload:
    """What a pickle would run."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


def test_pickle_in_place_of_tensors_is_refused_and_never_run(saved: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for content in (pickle.dumps(Payload(canary)), torch_save(Payload(canary), tmp_path)):
        replace_file(saved, content)
        with pytest.raises(CheckpointError, match=f"{FILE}: cannot be read"):
            open_checkpoint(saved)
    assert not canary.exists()


def replace_file(path: Path, content: bytes) -> None:
    """Replace FILE of the save ``path``, and make the manifest fit."""
    (path / FILE).write_bytes(content)
    stored = {"bytes": len(content), "hash": hash_file(path / FILE)}
    edit_manifest(path, lambda fields: fields["files"].update({FILE: stored}))


def torch_save(value: object, folder: Path) -> bytes:
    torch.save(value, folder / "value.pt")
    return (folder / "value.pt").read_bytes()


def test_manifest_that_names_other_tensors_than_the_file_holds_is_refused(saved: Path) -> None:
    edit_manifest(saved, lambda fields: fields["tensors"][0].update(dtype="float16"))
    with pytest.raises(CheckpointError, match=f"{FILE}: does not hold the tensors"):
        open_checkpoint(saved)


def test_newest_save_is_not_passed_over_for_a_damaged_file(
    saves: dict[int, Path], tmp_path: Path
) -> None:
    shutil.copytree(saves[1], tmp_path / "step-00000100")
    newest = Path(shutil.copytree(saves[1], tmp_path / "step-00000200"))
    truncate(newest)
    assert find_latest(tmp_path) == newest
