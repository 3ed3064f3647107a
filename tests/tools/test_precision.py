"""The benchmark of layouts in low precision: what it trains, and how it judges."""

from math import log2
from pathlib import Path

import pytest

from megatron.benchmarks import precision
from megatron.benchmarks.precision import (
    FIRST_SCALE,
    FULL,
    LAYOUTS,
    ONE_PROCESS,
    QUICK,
    Run,
    dims_of,
    make_config,
    rows_of,
)
from megatron.benchmarks.result import read_result
from megatron.config import ParallelConfig
from mpu import ParallelDims
from tests.figures import Figure

SEEDS = {f"{ONE_PROCESS}, seed 2": 1.1, f"{ONE_PROCESS}, seed 3": 1.4}


@pytest.mark.slow
def test_layouts_are_compared_in_both_precisions_and_drawn(tmp_path: Path, figure: Figure) -> None:
    results, picture = tmp_path / "result.json", tmp_path / "figure.png"
    assert precision.main(["--quick", "--json", str(results), "--figure", str(picture)]) == 0
    bf16, bf16_points, fp16, _ = read_result(results).tables
    for table in (bf16, fp16):
        assert [row["layout"] for row in table.rows][: len(LAYOUTS)] == list(LAYOUTS)
        ratios = [row["largest distance / spread"] for row in table.rows[: len(LAYOUTS)]]
        figure(table.title, largest_ratio=max(float(str(ratio)) for ratio in ratios))
        assert {row["inside"] for row in table.rows[1 : len(LAYOUTS)]} == {"yes"}
    assert [row["up to step"] for row in bf16_points.rows] == [2, 4]
    # What is compared is rounding, and not how many steps were made.
    assert {row["steps skipped"] for row in fp16.rows} == {0}
    assert {row["loss scale at the end"] for row in fp16.rows} == {f"2^{log2(FIRST_SCALE):g}"}
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_data_rank_has_at_least_four_microbatches_of_one_sample(name: str) -> None:
    layout: ParallelConfig = LAYOUTS[name]
    dims = dims_of(layout)
    for size in (FULL, QUICK):
        config = make_config(size, "fp16", layout, seed=1)
        assert config.layout(dims.world_size) == dims
        assert config.train.micro_batch_size == 1
        assert config.train.global_batch_size >= 4 * dims.data


def test_grid_is_that_of_the_layout() -> None:
    assert dims_of(LAYOUTS[ONE_PROCESS]) == ParallelDims()
    assert dims_of(ParallelConfig(tensor=2, pipeline=4, data=3)) == ParallelDims(2, 3, 4)


def test_layout_is_inside_where_it_is_nearer_than_the_seeds_are_apart_at_every_point() -> None:
    # One process ends at 1.0, its seeds at 1.1 and 1.4: a spread of 0.4.
    ends = {ONE_PROCESS: 1.0, **SEEDS, "near": 0.61, "far": 1.41}
    runs = {name: Run((2.0 + end, 0.0, end, end), 0, None) for name, end in ends.items()}
    rows = {row["layout"]: row for row in rows_of(runs, QUICK)}
    assert rows["near"]["inside"] == "yes"
    assert rows["far"]["inside"] == "no"
    assert rows["far"]["largest distance"] == pytest.approx(0.41)
    assert rows["far"]["mean distance"] == pytest.approx((0.205 + 0.41) / 2)
    assert rows["far"]["largest distance / spread"] == pytest.approx(0.41 / 0.4)
    assert "steps skipped" not in rows["far"]


def test_rows_in_fp16_tell_what_was_skipped() -> None:
    ends = {ONE_PROCESS: 1.0, **SEEDS}
    runs = {name: Run((end,) * 4, 3, 2.0**20) for name, end in ends.items()}
    row = next(iter(rows_of(runs, QUICK)))
    assert (row["steps skipped"], row["loss scale at the end"]) == (3, "2^20")
