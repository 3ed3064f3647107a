"""Parallelism does not change the model: loss and every gradient equal those of one rank.

In float64, to 1e-12 of the largest element of a gradient: sums in another order. The figures at the
end of the run are the worst of each case.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config import DataConfig, ModelConfig
from tests.figures import Figure
from tests.megatron.model.parallel import ONE_RANK, PARALLEL, Job, Layout, Outcome, run_job

TOLERANCE = 1e-12


def model(**options: Any) -> ModelConfig:
    shape = {"num_layers": 2, "hidden_size": 48, "num_heads": 12, "seq_length": 32}
    # 509 is prime: over every number of ranks there is padding.
    vocabulary = {"vocab_size": 509, "vocab_padding_multiple": 8}
    return ModelConfig(**(shape | vocabulary | options))


DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
DOCUMENTS = DataConfig(
    # Says that there is one; the model never reads it.
    tokenizer=Path("tokenizer"),
    reset_attention_mask=True,
    reset_position_ids=True,
    eod_mask_loss=True,
)

JOBS = {
    "bloom": Job(model()),
    "bloom, dropout": Job(model(**DROPOUT)),
    "untied, 8 heads": Job(model(tie_embeddings=False, num_heads=8)),
    "swiglu, rotary, untied, dropout": Job(
        model(activation="swiglu", position_embedding="rotary", tie_embeddings=False, **DROPOUT)
    ),
    "learned, 8 heads, dropout": Job(
        model(position_embedding="learned", num_heads=8, hidden_dropout=0.1)
    ),
    "geglu, no positions, no embedding norm": Job(
        model(activation="geglu", position_embedding="none", embedding_layernorm=False)
    ),
    "documents": Job(model(**DROPOUT), DOCUMENTS),
    "documents, rotary, sdpa": Job(model(position_embedding="rotary"), DOCUMENTS, backend="sdpa"),
    "dropout, explicit": Job(model(**DROPOUT), backend="explicit"),
    "documents, learned": Job(model(position_embedding="learned"), DOCUMENTS),
    "pooler, token types, dropout": Job(model(pooler=True, num_token_types=3, **DROPOUT)),
    "ranks of padding only": Job(model(vocab_padding_multiple=256)),
}


@cache
def one_rank(name: str) -> Outcome:
    return run_job(JOBS[name], ONE_RANK)


@pytest.mark.parametrize("name", JOBS)
def test_parallel_equals_serial(name: str, figure: Figure) -> None:
    serial = one_rank(name)
    worst = {"loss": 0.0, "norm": 0.0, "gradient": 0.0}
    for layout in PARALLEL:
        parallel = run_job(JOBS[name], layout)
        errors = relative_errors(serial, parallel)
        wrong = {key: error for key, error in errors.items() if not error <= TOLERANCE}
        assert not wrong, f"gradients at {layout}"
        worst["gradient"] = max(worst["gradient"], *errors.values())
        for key, got, want in (
            ("loss", parallel.loss, serial.loss),
            ("norm", parallel.grad_norm, serial.grad_norm),
        ):
            assert got == pytest.approx(want, rel=TOLERANCE), f"{key}, {layout}"
            worst[key] = max(worst[key], abs(got / want - 1))
    figure(f"parallel equals serial: {name}", **worst)


def relative_errors(serial: Outcome, parallel: Outcome) -> dict[str, float]:
    """Of each gradient, the largest error in parts of its largest element."""
    assert parallel.gradients.keys() == serial.gradients.keys()
    errors = {}
    for name, want in serial.gradients.items():
        assert want.abs().max() > 0, f"nothing reaches {name}"
        errors[name] = ((parallel.gradients[name] - want).abs().max() / want.abs().max()).item()
    return errors


@pytest.mark.parametrize("layout", PARALLEL, ids=str)
def test_initial_weights_do_not_depend_on_the_layout(layout: Layout) -> None:
    name = "swiglu, rotary, untied, dropout"
    parallel = run_job(JOBS[name], layout)
    for parameter, want in one_rank(name).weights.items():
        assert torch.equal(parallel.weights[parameter], want), parameter


@pytest.mark.parametrize("layout", [ONE_RANK, Layout(2), Layout(2, sequence=True)], ids=str)
def test_recomputation_changes_nothing(layout: Layout) -> None:
    """The same numbers in the same order: equal bit for bit, with dropout."""
    config = model(**DROPOUT)
    plain = run_job(Job(config), layout)
    for recompute in ("selective", "full"):
        again = run_job(Job(config, recompute=recompute), layout)
        assert again.loss == plain.loss
        for parameter, want in plain.gradients.items():
            assert torch.equal(again.gradients[parameter], want), f"{parameter}, {recompute}"


def test_dropout_is_not_left_out() -> None:
    assert one_rank("bloom").loss != one_rank("bloom, dropout").loss
