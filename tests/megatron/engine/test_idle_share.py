"""How much of its time a pipeline waits: what the plans give is what theory says."""

import pytest

from megatron.config import ScheduleName
from megatron.engine.schedules import ideal_idle_share, idle_share, plan_training


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize(
    ("name", "chunks"),
    [("1f1b", 1), ("zero_bubble", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 3)],
)
def test_plans_wait_as_long_as_theory_says(
    name: ScheduleName, chunks: int, ranks: int, groups: int
) -> None:
    microbatches = groups * ranks
    plan = plan_training(name, ranks, chunks, microbatches)
    ideal = ideal_idle_share(name, ranks, chunks, microbatches)
    assert idle_share(plan) == pytest.approx(ideal, abs=1e-12)


def test_theory_of_one_pipeline_by_hand() -> None:
    assert ideal_idle_share("1f1b", 4, 1, 9) == 3 / 12
    assert ideal_idle_share("interleaved_1f1b", 4, 2, 12) == 3 / 27
    assert ideal_idle_share("zero_bubble", 4, 1, 9) == 3 / 30
