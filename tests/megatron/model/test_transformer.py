"""The transformer on one rank: who depends on whom, caches, and recomputation."""

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.config import ModelConfig, PositionEmbedding, Recompute
from megatron.model.inputs import ModelInputs
from megatron.model.language_model import BloomForPretraining
from mpu import RngStreams
from tests.megatron.model.sample import SMALL, small_model, with_options

BATCH, SEQ = 2, SMALL.seq_length
POSITIONS: list[PositionEmbedding] = ["alibi", "rotary", "learned", "none"]


def tokens() -> Tensor:
    return torch.randint(SMALL.vocab_size, (BATCH, SEQ))


def other(token: Tensor) -> Tensor:
    return (token + 1) % SMALL.vocab_size


def gradients(model: BloomForPretraining, ids: Tensor) -> dict[str, Tensor]:
    """The gradient of the loss, with the dropout that the model has, by parameter."""
    samples = torch.arange(BATCH)
    loss_weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)).double()
    inputs = ModelInputs(ids, ids.roll(-1, dims=1), loss_weights, samples)
    model(inputs, RngStreams(5, samples)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_token_changes_nothing_before_it(
    single_group: ProcessGroup, positions: PositionEmbedding
) -> None:
    model = small_model(single_group, with_options(position_embedding=positions))
    ids = tokens()
    before = model.logits(ids)
    for i in (0, 7, SEQ - 1):
        changed = ids.clone()
        changed[:, i] = other(ids[:, i])
        after = model.logits(changed)
        assert torch.equal(after[:, :i], before[:, :i])
        assert (after[:, i] - before[:, i]).abs().max() > 1e-3


@torch.no_grad()
def test_document_changes_nothing_in_another(single_group: ProcessGroup) -> None:
    model = small_model(single_group)
    ids = tokens()
    documents = (torch.arange(SEQ) >= 9).long().expand(BATCH, SEQ)
    before = model.language_model(ids, documents=documents)
    changed = torch.cat([other(ids[:, :9]), ids[:, 9:]], dim=1)
    after = model.language_model(changed, documents=documents)
    assert torch.equal(after[:, 9:], before[:, 9:])
    assert not torch.equal(after[:, :9], before[:, :9])


@torch.no_grad()
def test_second_document_is_computed_as_if_alone(single_group: ProcessGroup) -> None:
    model = small_model(single_group)
    ids = tokens()
    documents = (torch.arange(SEQ) >= 9).long().expand(BATCH, SEQ)
    together = model.language_model(ids, documents=documents)[:, 9:]
    torch.testing.assert_close(together, model.language_model(ids[:, 9:]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("alibi_precision", ["exact", "bloom_bf16"])
@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_cached_steps_equal_one_forward_pass(
    single_group: ProcessGroup, positions: PositionEmbedding, alibi_precision: str
) -> None:
    config = with_options(position_embedding=positions, alibi_precision=alibi_precision)
    model = small_model(single_group, config)
    ids = tokens()
    caches = model.new_caches(SEQ)
    # A prompt, single tokens, and several at once.
    parts = [model.logits(part, caches=caches) for part in ids.split([10, 1, 1, 8, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.logits(ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        with_options(activation="swiglu", position_embedding="rotary", tie_embeddings=False),
        with_options(hidden_dropout=0.2, attention_dropout=0.3),
    ],
    ids=["bloom", "gated", "dropout"],
)
def test_recomputation_leaves_gradients_as_they_are(
    single_group: ProcessGroup, config: ModelConfig, recompute: Recompute
) -> None:
    ids = tokens()
    want = gradients(small_model(single_group, config), ids)
    got = gradients(small_model(single_group, config, recompute=recompute), ids)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name


def test_every_parameter_has_a_gradient(single_group: ProcessGroup) -> None:
    model = small_model(single_group)
    found = gradients(model, tokens())
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.abs().max() > 1e-6 for gradient in found.values())
