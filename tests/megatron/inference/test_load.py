"""A save becomes a model at any tensor size; one that is not what it says is refused."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.checkpoint.load import open_checkpoint
from megatron.config import ModelConfig
from megatron.errors import CheckpointError, ConfigError, NonFiniteError
from megatron.inference.load import find_checkpoint, load_model, saved_config, saved_tokenizer
from mpu import gather_from_region
from tests.distributed import run_ranks
from tests.megatron.checkpoint.sample import edit_manifest
from tests.megatron.model.sample import (
    LAST_WEIGHT,
    SMALL,
    save_model,
    small_model,
    with_options,
)
from tests.megatron.test_tokenizer import make_tokenizer_file

CPU = torch.device("cpu")
TOKENS = torch.arange(20).view(2, 10)


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By tensor size, a save of the small model. Tests do not change it."""
    folder = tmp_path_factory.mktemp("saves")
    return {size: run_ranks(size, save_model, folder / str(size))[0] for size in (1, 4)}


def load(paths: Sequence[Path], dtype: torch.dtype) -> list[Tensor]:
    """For each save, the logits of its model, which is cut over all ranks."""
    group = dist.group.WORLD
    assert group is not None
    found = []
    for path in paths:
        reader = open_checkpoint(path, group=group)
        config = saved_config(reader, tensor=group.size()).model
        model = load_model(reader, config, group, dtype=dtype, device=CPU)
        assert all(parameter.dtype == dtype for parameter in model.parameters())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        found.append(gather_from_region(model.logits(TOKENS), group))
    return found


def original(dtype: torch.dtype) -> Tensor:
    """Logits of the model that was saved, which is a float32 one."""
    group = dist.group.WORLD
    assert group is not None
    return small_model(group, dtype=torch.float32).to(dtype).logits(TOKENS).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loaded_model_is_the_saved_one(saves: dict[int, Path], dtype: torch.dtype) -> None:
    want = run_ranks(1, original, dtype)[0]
    (found,) = run_ranks(1, load, list(saves.values()), dtype)
    assert all(torch.equal(got, want) for got in found)


@pytest.mark.parametrize("size", [2, 4])
def test_model_is_loaded_at_any_tensor_size(saves: dict[int, Path], size: int) -> None:
    want = run_ranks(1, original, torch.float64)[0][..., : SMALL.vocab_size]
    for found in run_ranks(size, load, list(saves.values()), torch.float64):
        for got in found:
            # The sums over ranks are rounded in another order.
            torch.testing.assert_close(got[..., : SMALL.vocab_size], want, rtol=0, atol=1e-12)


def test_model_that_does_not_divide_by_the_ranks_is_refused(saves: dict[int, Path]) -> None:
    reader = open_checkpoint(saves[1])
    with pytest.raises(ConfigError, match=r"model.num_heads \(4\) .* parallel.tensor \(3\)"):
        saved_config(reader, tensor=3)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("number", "dtype", "is_finite"),
    [
        (math.nan, torch.float32, False),
        (-math.inf, torch.float32, False),
        (1e5, torch.float32, True),
        # Too large as rounded.
        (1e5, torch.float16, False),
    ],
)
def test_a_weight_that_is_not_finite_is_refused(
    tmp_path: Path, size: int, number: float, dtype: torch.dtype, is_finite: bool
) -> None:
    path = run_ranks(size, save_model, tmp_path, SMALL, None, number)[0]
    for message in run_ranks(size, load_not_finite, path, dtype):
        ranks = "rank 0" if size == 1 else "ranks 0, 1"
        found = f"{path}: in {dtype}, the weight of {LAST_WEIGHT} is not finite on {ranks}"
        assert message == (None if is_finite else found)


def load_not_finite(path: Path, dtype: torch.dtype) -> str | None:
    try:
        load([path], dtype)
    except NonFiniteError as error:
        return str(error)
    return None


def test_weights_of_another_model_are_refused(saves: dict[int, Path]) -> None:
    message = run_ranks(1, load_as, saves[1], with_options(tie_embeddings=False))[0]
    assert "Missing in the checkpoint: weight of output_layer.weight" in message
    message = run_ranks(1, load_as, saves[1], with_options(ffn_hidden_size=64))[0]
    assert "of shape (128, 32), but the model's is float32 of shape (64, 32)" in message


def load_as(path: Path, config: ModelConfig) -> str:
    group = dist.group.WORLD
    assert group is not None
    reader = open_checkpoint(path, group=group)
    with pytest.raises(CheckpointError) as caught:
        load_model(reader, config, group, dtype=torch.float32, device=CPU)
    return str(caught.value)


def test_config_comes_back(saves: dict[int, Path]) -> None:
    config = saved_config(open_checkpoint(saves[4]))
    assert config.model == SMALL
    assert config.parallel.tensor == 1
    assert config.train.samples == 8


@pytest.mark.parametrize(
    ("name", "value"),
    [("position_embedding", "best"), ("num_layers", "two"), ("num_heads", 5), ("surprise", 1)],
)
def test_config_that_is_none_is_refused(tmp_path: Path, name: str, value: object) -> None:
    (path,) = run_ranks(1, save_model, tmp_path)
    edit_manifest(path, lambda fields: fields["config"]["model"].update({name: value}))
    with pytest.raises(CheckpointError, match=f"its config cannot be used: .*{name}"):
        saved_config(open_checkpoint(path))


def test_tokenizer_comes_back(tmp_path: Path) -> None:
    file = make_tokenizer_file(tmp_path / "tokenizer.json")
    (path,) = run_ranks(1, save_model, tmp_path, SMALL, file)
    # What lies beside the files of the save is not read.
    (path / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "Surprise"}')
    tokenizer = saved_tokenizer(open_checkpoint(path))
    assert tokenizer is not None
    assert tokenizer.files() == {"tokenizer.json": file.read_bytes()}
    assert tokenizer.path == path / "tokenizer"


def test_save_without_a_tokenizer_has_none(saves: dict[int, Path]) -> None:
    assert saved_tokenizer(open_checkpoint(saves[1])) is None


def test_newest_save_of_a_run_is_found(tmp_path: Path) -> None:
    (path,) = run_ranks(1, save_model, tmp_path)
    assert find_checkpoint(tmp_path) == path
    assert find_checkpoint(path) == path
    damaged = path.with_name("step-00000005")
    damaged.mkdir()
    # A save without a manifest is a damaged one, which is told when it is opened.
    assert find_checkpoint(tmp_path) == find_checkpoint(damaged) == damaged
    with pytest.raises(CheckpointError, match="manifest.json: the file is missing"):
        open_checkpoint(damaged)
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run folder"):
        find_checkpoint(tmp_path / "elsewhere")
