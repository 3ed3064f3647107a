"""A run that goes on with other batches, another length, or samples of another length.

None of the combinations fails, the steps are those that were foreseen, and what is told of them is
right. That no token is read too often is tested on numbered tokens, see
``tests/megatron/data/test_history_campaign.py``.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.figures import Figure
from tests.integration.runs import (
    SEQ_LENGTH,
    base_argv,
    make_data,
    newest_save,
    records,
    run_pretrain,
    values,
)

CHECKPOINT = 4
CASES = 30
IN_SUITE = (0, 1, 2)
LAST_STEP = re.compile(r"step +(\d+)/(\d+) \|")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changed")
    make_data(folder / "text", documents=12)
    make_data(folder / "more", documents=5, seed=1)
    return folder


def argv(folder: Path, run: str, **changes: Any) -> list[str]:
    return base_argv(
        folder,
        folder=folder / run,
        model__num_layers=1,
        model__hidden_size=16,
        train__dtype="fp32",
        log__interval=1,
        data__paths={str(folder / "text"): 0.6, str(folder / "more"): 0.4},
        data__split=[1, 0, 0],
        **{"train__micro_batch_size": 1, **changes},
    )


def random_starts(choose: random.Random) -> Iterator[dict[str, Any]]:
    """The options of a run's starts, of which each but the last is stopped on its way."""
    total, length = choose.randint(20, 60), SEQ_LENGTH
    starts = choose.randint(2, 3)
    for number in range(starts):
        batch = choose.randint(2, 12)
        options: dict[str, Any] = {
            "train__samples": total,
            "train__global_batch_size": batch,
            "model__seq_length": length,
        }
        if choose.random() < 0.4:
            options |= {
                "train__rampup__start": 1,
                "train__rampup__increment": batch - 1,
                "train__rampup__samples": choose.randint(1, total),
            }
        if number < starts - 1:
            options["train__stop_at_step"] = choose.randint(1, 3) + 3 * number
        yield options
        total = choose.choice([total, choose.randint(30, 90)])
        length = choose.choice([length, choose.choice([8, 16, 48, 64])])


def foresee(
    step: int, samples: int, tokens: int, options: dict[str, Any]
) -> tuple[int, int, int, int]:
    """Step, samples and tokens where a start ends, and where it would end unless stopped."""
    total, most = options["train__samples"], options["train__global_batch_size"]
    grows_until = options.get("train__rampup__samples", -1)
    stop = options.get("train__stop_at_step", 10**9)
    end, reached = step, samples
    while True:
        # One increment: half-way through the ramp-up there is nothing between first and last.
        batch = 1 if reached < grows_until else most
        if reached + batch > total:
            return step, samples, tokens, end
        reached, end = reached + batch, end + 1
        if end <= stop:
            step, samples = end, reached
            tokens += batch * options["model__seq_length"]


@pytest.mark.parametrize(
    "case",
    [c if c in IN_SUITE else pytest.param(c, marks=pytest.mark.nightly) for c in range(CASES)],
)
def test_run_goes_on_with_other_options(folder: Path, case: int, figure: Figure) -> None:
    name = f"case-{case}"
    step = samples = tokens = 0
    for options in random_starts(random.Random(case)):
        before = step
        step, samples, tokens, end = foresee(step, samples, tokens, options)
        result = run_pretrain(argv(folder, name, **options))
        assert result.exit_code == 0, (options, result.stderr)
        steps = values(folder / name, "step")
        assert steps == list(range(1, step + 1))
        assert values(folder / name, "consumed_samples")[-1] == samples
        assert values(folder / name, "consumed_tokens")[-1] == tokens
        told = [tuple(map(int, found)) for found in LAST_STEP.findall(result.stdout)]
        assert told == [(number, end) for number in range(before + 1, step + 1)]
    state = newest_save(folder / name).state
    assert (state["step"], state["consumed_samples"], state["consumed_tokens"]) == (
        step,
        samples,
        tokens,
    )
    figure("changed resumes, really run", failed=0)


def test_larger_batches_take_a_blend_to_its_end(folder: Path) -> None:
    steps = {"train__samples": 100, "train__micro_batch_size": 2}
    first = argv(folder, "larger", train__global_batch_size=10, train__stop_at_step=3, **steps)
    assert run_pretrain(first).exit_code == 0
    result = run_pretrain(argv(folder, "larger", train__global_batch_size=14, **steps))
    assert result.exit_code == 0, result.stderr
    assert "step 8/8 " in result.stdout
    assert values(folder / "larger", "consumed_samples")[-1] == 100


def test_learning_rate_that_jumps_is_one_warning_with_both_rates(folder: Path) -> None:
    common: dict[str, Any] = {"optimizer__decay": "linear", "optimizer__lr": 0.001}
    argv_ = argv(folder, "jump", train__samples=40, train__stop_at_step=9, **common)
    assert run_pretrain(argv_).exit_code == 0
    result = run_pretrain(argv(folder, "jump", train__samples=80, train__stop_at_step=12, **common))
    assert result.exit_code == 0
    (warning,) = result.complaints
    # Step 10 ends at sample 40: of 40 nothing is left, and of 80 half of the rate.
    assert "step 10 is 0.0005, but would be 0 " in warning
    same = run_pretrain(argv(folder, "jump", train__samples=80, **common))
    assert (same.exit_code, same.complaints) == (0, [])


def test_learned_positions_keep_the_length_of_their_samples(folder: Path) -> None:
    common: dict[str, Any] = {"model__position_embedding": "learned", "train__samples": 8}
    assert run_pretrain(argv(folder, "learned", **common)).exit_code == 0
    result = run_pretrain(argv(folder, "learned", model__seq_length=2 * SEQ_LENGTH, **common))
    assert result.exit_code == CHECKPOINT
    assert "model.seq_length is 64, but 32 in" in result.complaints[0]
    assert len(records(folder / "learned", "start")) == 1
