"""The ALiBi slopes are copied to a device once, and no change of the model rounds them."""

import copy

import torch

from megatron.model.alibi import alibi_slopes
from megatron.model.language_model import TransformerLanguageModel
from mpu import ParallelDims, build_groups
from tests.distributed import run_ranks
from tests.megatron.model.sample import small_model

CPU, META = torch.device("cpu"), torch.device("meta")


def test_slopes_are_made_once_and_stay_as_they_are() -> None:
    run_ranks(2, check_slopes)


def check_slopes() -> None:
    group = build_groups(ParallelDims(tensor=2)).tensor
    model = small_model(group).language_model
    assert isinstance(model, TransformerLanguageModel)
    want = alibi_slopes(4).chunk(2)[group.rank()]
    first = model._slopes_on(CPU)
    assert torch.equal(first, want)
    assert model._slopes_on(CPU) is first
    for change in (model.bfloat16, model.double, model.to_empty):
        change(device=CPU) if change == model.to_empty else change()
        assert model._slopes_on(CPU).dtype == torch.float32
        assert torch.equal(model._slopes_on(CPU), want)
    assert model._slopes_on(META).is_meta
    assert not any("slopes" in name for name in copy.copy(model).state_dict())
