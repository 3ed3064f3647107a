"""The numbers behind dropout and initialisation: what they depend on, and how they are spread.

Statistics are of fixed seeds, so that no test is flaky; bounds are five standard deviations.
"""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import mpu.rng
from mpu import RngStreams, ShardSpec, dropout, init_normal, set_shard_spec
from tests.shards import cut, join

SAMPLES = torch.tensor([0, 1, 2**40])


def kept(keys: Tensor, columns: int, p: float = 0.5) -> Tensor:
    """1 where dropout keeps and 0 where not, float64."""
    return (dropout(torch.ones(*keys.shape, columns), p, keys) != 0).double()


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_mean_and_has_the_right_variance(p: float) -> None:
    keys = RngStreams(1, SAMPLES[:1]).keys(0, axes=[range(1000)])
    y = dropout(torch.ones(1, 1000, 1000, dtype=torch.float64), p, keys)
    assert y.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-15)
    share = (y != 0).double().mean().item()
    assert share == pytest.approx(1 - p, abs=5 * math.sqrt(p * (1 - p) / 1e6))
    # Within rows and within columns too, not only over all.
    for dim in (1, 2):
        sigma = math.sqrt(p * (1 - p) / 1000)
        assert (y != 0).double().mean(dim).std().item() == pytest.approx(sigma, rel=0.12)


def test_dropout_without_probability_changes_nothing() -> None:
    x = torch.randn(3, 50, 100)
    keys = RngStreams(1, SAMPLES).keys(0, axes=[range(50)])
    assert torch.equal(dropout(x, 0.0, keys), x)


def test_gradient_is_dropped_where_the_value_is() -> None:
    keys = RngStreams(1, SAMPLES).keys(0, axes=[range(5)])
    x = torch.randn(3, 5, 40, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    dropout(x, 0.25, keys).backward(grad)
    mask = kept(keys, 40, p=0.25)
    assert x.grad is not None
    assert 0 < mask.mean() < 1
    torch.testing.assert_close(x.grad, grad * mask / 0.75, rtol=1e-15, atol=0)


def test_keys_differ_by_every_part_of_the_name() -> None:
    streams = [RngStreams(seed, SAMPLES) for seed in (0, 1, 2**62)]
    keys = [
        stream.keys(layer, site, axes=[range(4), range(64)])
        for stream, layer, site in product(streams, (-1, 0, 1, 2, 3), range(4))
    ]
    flat = torch.cat([key.flatten() for key in keys])
    assert flat.numel() == 3 * 5 * 4 * 3 * 4 * 64
    assert flat.unique().numel() == flat.numel()


def test_masks_of_neighbours_are_independent() -> None:
    """Neighbours in seed, sample, layer, site, head, row and column."""
    size = 256
    rows, bound = [range(2), range(size)], 5 / math.sqrt(2 * size * (size - 1))
    own = kept(RngStreams(7, SAMPLES[:1]).keys(2, 1, axes=rows), size)
    others = {
        "seed": RngStreams(8, SAMPLES[:1]).keys(2, 1, axes=rows),
        "sample": RngStreams(7, SAMPLES[1:2]).keys(2, 1, axes=rows),
        "layer": RngStreams(7, SAMPLES[:1]).keys(3, 1, axes=rows),
        "site": RngStreams(7, SAMPLES[:1]).keys(2, 2, axes=rows),
        "layer and site swapped": RngStreams(7, SAMPLES[:1]).keys(1, 2, axes=rows),
    }
    for name, keys in others.items():
        assert abs(correlation(own, kept(keys, size))) < bound, name
    assert abs(correlation(own[:, 0], own[:, 1])) < bound * math.sqrt(2), "head"
    for distance in (1, 2, 3, 64):
        rows_apart = correlation(own[:, :, distance:], own[:, :, :-distance])
        columns_apart = correlation(own[..., distance:], own[..., :-distance])
        assert abs(rows_apart) < 1.2 * bound, f"rows {distance} apart"
        assert abs(columns_apart) < 1.2 * bound, f"columns {distance} apart"


def test_keys_of_a_part_are_a_part_of_the_keys() -> None:
    streams = RngStreams(3, SAMPLES)
    whole = streams.keys(5, 1, axes=[range(8), range(32)])
    assert whole.shape == (3, 8, 32)
    part = streams.keys(5, 1, axes=[range(2, 4), range(8, 32)])
    assert torch.equal(part, whole[:, 2:4, 8:32])
    # A sample has its numbers in whichever microbatch it comes.
    alone = RngStreams(3, SAMPLES[2:]).keys(5, 1, axes=[range(8), range(32)])
    assert torch.equal(alone, whole[2:])


def filled(spec: ShardSpec, rank: int, size: int, seed: int = 5, name: str = "w") -> Tensor:
    parameter = nn.Parameter(torch.full(spec.local_shape(size), math.nan, dtype=torch.float64))
    set_shard_spec(parameter, spec)
    init_normal(parameter, seed=seed, name=name, std=0.02, rank=rank, size=size)
    return parameter.detach()


def test_initial_weights_are_normal() -> None:
    weights = filled(ShardSpec((1000, 1000)), 0, 1) / 0.02
    n = weights.numel()
    assert weights.mean().item() == pytest.approx(0, abs=5 / math.sqrt(n))
    assert weights.var().item() == pytest.approx(1, abs=5 * math.sqrt(2 / n))
    assert (weights**4).mean().item() == pytest.approx(3, abs=5 * math.sqrt(96 / n))
    for bound in (2.0, 3.0, 4.0):
        share = math.erfc(bound / math.sqrt(2))
        found = (weights.abs() > bound).double().mean().item()
        assert found == pytest.approx(share, abs=5 * math.sqrt(share / n)), bound
    # Kolmogorov and Smirnov: the largest distance from the distribution, at a level of 0.001.
    uniform = torch.special.ndtr(weights.flatten().sort().values)
    distance = (uniform - (torch.arange(n, dtype=torch.float64) + 0.5) / n).abs().max()
    assert distance * math.sqrt(n) < 1.95


def test_neighbouring_weights_are_independent() -> None:
    weights = filled(ShardSpec((1000, 1000)), 0, 1)
    for distance in (1, 2, 8):
        assert abs(correlation(weights[distance:], weights[:-distance])) < 5e-3
        assert abs(correlation(weights[:, distance:], weights[:, :-distance])) < 5e-3


def test_weights_depend_on_seed_and_name() -> None:
    spec = ShardSpec((300, 300))
    own = filled(spec, 0, 1)
    assert torch.equal(filled(spec, 0, 1), own)
    for other in (filled(spec, 0, 1, seed=6), filled(spec, 0, 1, name="v")):
        assert abs(correlation(own, other)) < 5 / 300


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "spec",
    [
        ShardSpec((48, 20), dim=0),
        ShardSpec((20, 48), dim=1),
        ShardSpec((48, 20), dim=0, blocks=2),
        ShardSpec((48, 20), dim=0, blocks=3),
        ShardSpec((48,), dim=0),
        ShardSpec((48, 20)),
    ],
    ids=str,
)
def test_ranks_draw_their_parts_of_the_same_matrix(spec: ShardSpec, size: int) -> None:
    whole = filled(spec, 0, 1)
    assert torch.equal(join([filled(spec, rank, size) for rank in range(size)], spec), whole)


@pytest.mark.parametrize("rank", range(4))
def test_padding_starts_at_zero(rank: int) -> None:
    spec = ShardSpec((509, 20), dim=0, padded_run=256)
    whole = filled(ShardSpec((509, 20)), 0, 1)
    assert torch.equal(filled(spec, rank, 4), cut(whole, spec, rank, 4))


def test_weights_do_not_depend_on_how_many_are_drawn_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = ShardSpec((48, 20), dim=0, blocks=2)
    want = filled(spec, 1, 2)
    monkeypatch.setattr(mpu.rng, "_INIT_ELEMENTS", 100)
    assert torch.equal(filled(spec, 1, 2), want)
