"""The benchmarks run, count what theory says, and make the page of the documentation."""

import re
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from string import Template

import pytest
import torch
from torch import Tensor

from megatron.config import ModelConfig
from megatron.errors import ConfigError, DataError, RunError
from megatron.launch import Launch
from tests.figures import Figure
from tools.benchmarks import (
    attention,
    communication,
    flops,
    head,
    kernels,
    page,
    startup,
    train_step,
    train_step_gpu,
    train_step_tensor,
)
from tools.benchmarks.measure import (
    NoisyError,
    Times,
    check_quiet,
    interleave,
    peak_bytes,
)
from tools.benchmarks.result import MIB, Result, Row, Table, publish, read_result, table_lines

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
BENCHMARKS = {
    "attention": attention,
    "communication": communication,
    "flops": flops,
    "head": head,
    "kernels": kernels,
    "startup": startup,
    "train_step": train_step,
    "train_step_gpu": train_step_gpu,
    "train_step_tensor": train_step_tensor,
}
TIMED = ("attention", "head", "kernels")
MODEL = ModelConfig(num_layers=1, hidden_size=8, num_heads=1, vocab_size=16, seq_length=4)

Quick = Callable[[str], Result]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Quick:
    """What a benchmark finds with ``--quick``; each runs once."""
    folder = tmp_path_factory.mktemp("results")

    @cache
    def run(name: str) -> Result:
        path = folder / f"{name}.json"
        device = ["--device", "cpu"] if name in TIMED else []
        assert BENCHMARKS[name].main(["--quick", "--json", str(path), *device]) == 0
        return read_result(path)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_writes_tables_and_where_they_come_from(name: str, quick: Quick) -> None:
    result = quick(name)
    assert result.benchmark == name
    assert result.environment["torch"] == torch.__version__
    assert {"device", "threads", "triton", "transformers", "date"} <= result.environment.keys()
    assert result.tables
    for table in result.tables:
        assert table.rows
        assert {tuple(row) for row in table.rows} == {tuple(table.rows[0])}


@pytest.mark.slow
def test_layers_communicate_what_theory_says(quick: Quick) -> None:
    (table,) = quick("communication").tables
    assert len(table.rows) == 6
    for row in table.rows:
        assert row["calls"] == row["calls in theory"]
        assert row["hidden states sent"] == row["sent in theory"]


@pytest.mark.slow
def test_counted_operations_are_those_of_the_formula(quick: Quick) -> None:
    (table,) = quick("flops").tables
    assert [row["model"] for row in table.rows] == ["560m", "1b1", "1b7", "3b", "7b1", "176b"]
    for row in table.rows:
        assert row["GFLOP counted"] == pytest.approx(row["GFLOP by formula"], rel=1e-3)


@pytest.mark.slow
def test_a_run_starts_within_a_second(quick: Quick, figure: Figure) -> None:
    (table,) = quick("startup").tables
    seconds = {row["part"]: row["CPU s"] for row in table.rows}
    figure("start of BLOOM 1b7", seconds=seconds["together"])
    assert float(str(seconds["together"])) < 1


@pytest.mark.slow
def test_fused_head_needs_less_memory_than_plain_logits(quick: Quick) -> None:
    _, table = quick("head").tables
    memory = {row["contender"]: row["peak MiB"] for row in table.rows}
    assert float(str(memory["fused"])) < float(str(memory["plain"]))


@pytest.mark.slow
def test_tensor_ranks_send_little_more_than_the_least(quick: Quick) -> None:
    (table,) = quick("train_step_tensor").tables
    sent, least = (
        float(str(table.rows[0][name])) for name in ("MiB a rank sends", "MiB in theory")
    )
    assert least < sent < 1.05 * least


def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    clock: Iterator[float] = iter([9, 9, 4, 1, 2, 3])

    def timer(work: Callable[[], object]) -> float:
        work()
        return next(clock)

    works = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    times = interleave(works, timer, rounds=2)
    assert calls == ["a", "b"] * 3
    assert times == {"a": Times((4, 2)), "b": Times((1, 3))}
    assert times["a"].least == 2
    assert times["a"].spread == 1.5


def test_times_that_vary_are_refused() -> None:
    times = {"steady": Times((1, 1.2, 1.3)), "wild": Times((1, 1.4, 9))}
    with pytest.raises(NoisyError, match=r"step: the median time of wild is 1\.40 times its least"):
        check_quiet("step", times, allow_noise=False)
    check_quiet("step", times, allow_noise=True)
    check_quiet("step", {"steady": times["steady"]}, allow_noise=False)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_is_what_was_held_at_once() -> None:
    def work() -> None:
        for _ in range(3):
            torch.ones(64 * MIB // 4)

    assert 60 * MIB < peak_bytes(work, CPU) < 100 * MIB


def test_micro_batch_fills_the_memory() -> None:
    gib = 2**30
    # 50 GiB of weights and 4 GiB a sequence; 92 % of 100 GiB leave room for ten.
    assert train_step_gpu.largest_micro_batch(54 * gib, 58 * gib, 100 * gib) == 10
    assert train_step_gpu.largest_micro_batch(5 * gib, 6 * gib, 100 * gib) == 32


def test_smaller_micro_batch_is_tried_where_one_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[int] = []

    def step(tokens: Tensor) -> float:
        tried.append(len(tokens))
        if len(tokens) > 2:
            raise torch.OutOfMemoryError
        return tokens.sum().item()

    monkeypatch.setattr(train_step_gpu, "build_step", lambda *args: step)
    monkeypatch.setattr(train_step_gpu, "_first_guess", lambda *args: 4)
    launch = Launch(0, 1, CPU, groups=None)  # type: ignore[arg-type]
    assert train_step_gpu.measure(launch, "ours", MODEL).micro_batch == 2
    assert tried[:3] == [4, 3, 2]


def test_model_that_never_fits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(tokens: Tensor) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train_step_gpu, "build_step", lambda *args: step)
    launch = Launch(0, 1, CPU, groups=None)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="not even one sequence fits"):
        train_step_gpu.measure(launch, "ours", MODEL)


def test_utilisation_is_that_of_the_median_step() -> None:
    found = train_step_gpu.Measurement(2, Times((1, 2, 4)), peak_bytes=0, kernels={})
    # 8 tokens in 2 s, of 3 (2 12 h^2 + 4 k h + 2 h V) operations each, with k keys of h = 8.
    row = train_step_gpu.row_of("m", "ours", MODEL, found, peak=1e5)
    assert row["tokens/s"] == 4
    assert row["MFU full"] == f"{4 * 3 * (1536 + 128 + 256) / 1e5:.1%}"
    assert row["MFU causal"] == f"{4 * 3 * (1536 + 64 + 256) / 1e5:.1%}"
    assert train_step_gpu.row_of("m", "ours", MODEL, found, peak=None)["MFU full"] is None


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        ("triton_tem_fused_zeros_2", "attention"),
        ("void at::native::vectorized_layer_norm_kernel<c10::BFloat16>", "layer norm"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDA>", "element-wise"),
        ("void at::native::reduce_kernel<512, 1, ReduceOp<float>>", "reductions"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("something else", "other"),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel: str, kind: str) -> None:
    assert train_step_gpu.kind_of(kernel) == kind


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_benchmark_says_that_it_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        train_step_gpu.main([])


def test_table_has_even_columns() -> None:
    rows: list[Row] = [
        {"name": "a", "ms": 12345.6, "n": 10_000},
        {"name": "long", "ms": 0.01234, "n": None},
    ]
    assert list(table_lines(Table("", rows))) == [
        "| name | ms     | n      |",
        "| ---- | ------ | ------ |",
        "| a    | 12,346 | 10,000 |",
        "| long | 0.0123 | -      |",
    ]


def test_documentation_is_what_the_tool_makes() -> None:
    made = page.make_page(ROOT / "docs" / "performance")
    assert (ROOT / "docs" / "performance.md").read_text() == made, (
        "run python -m tools.benchmarks.page"
    )


def test_page_has_tables_with_device_and_date_or_says_not_measured(tmp_path: Path) -> None:
    environment = {"device": "Abacus 9", "torch": "2.13", "date": "2026-01-02"}
    table = Table("Some head", [{"contender": "fused", "ms": 7}])
    publish(Result("head", environment, [table]), tmp_path / "head_gpu.json")
    made = page.make_page(tmp_path)
    assert "**Some head**, Abacus 9, 2026-01-02\n\n| contender | ms |\n" in made
    assert "torch 2.13" in made
    assert made.count("| GPU    | not measured |") == 3
    assert "$" not in made


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("heads_cpu", "{}", "the page has no place for it"),
        ("head_cpu", "{", "is not the result of a benchmark"),
        ("head_cpu", "{}", "is not the result of a benchmark"),
    ],
)
def test_wrong_file_is_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.json").write_text(text)
    with pytest.raises(DataError, match=rf"{name}\.json: {message}"):
        page.make_page(tmp_path)


def test_page_has_the_shapes_of_the_benchmark() -> None:
    rows = []
    for name, shape in train_step.SHAPES.items():
        model = shape.model
        numbers = (model.num_layers, model.hidden_size, model.num_heads, model.vocab_size)
        texts = [name, *(f"{n:,}" for n in (*numbers, model.seq_length, shape.batch))]
        rows.append(texts)
    template = page.TEMPLATE.read_text()
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in template.splitlines()]
    assert [row for row in found if row and row[0] in train_step.SHAPES] == rows


def test_page_has_a_place_for_what_the_commands_write() -> None:
    script = (ROOT / "tools" / "benchmarks" / "gpu.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    template = page.TEMPLATE.read_text()
    written = set(re.findall(r"docs/performance/(\w+)\.json", template))
    written |= {
        f"{name.removesuffix('_gpu')}_gpu"
        for name in re.findall(r"^benchmark (\w+)", script, re.MULTILINE)
    }
    assert written == set(Template(template).get_identifiers())


def test_gpu_script_takes_less_than_ten_minutes() -> None:
    script = (ROOT / "tools" / "benchmarks" / "gpu.sh").read_text()
    limits = re.findall(r"^(?:part|benchmark) \w+ (\d+)", script, re.MULTILINE)
    assert len(limits) == 5
    assert sum(map(int, limits)) < 600
