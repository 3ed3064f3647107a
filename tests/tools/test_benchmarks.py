"""The benchmarks run, and find what theory says."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from math import log
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from megatron.benchmarks import (
    attention,
    communication,
    contenders,
    engines,
    flops,
    gains,
    head,
    kernels,
    launches,
    megatron_core,
    starts,
    startup,
    train_step,
    train_step_gpu,
    train_step_tensor,
)
from megatron.benchmarks.ablations import Ablation
from megatron.benchmarks.changes import CPU_CHANGES, GPU_CHANGES, Change
from megatron.benchmarks.measure import (
    NoisyError,
    Times,
    check_losses,
    check_quiet,
    interleave,
    peak_bytes,
    runnable,
)
from megatron.benchmarks.result import MIB, Result, read_result
from megatron.config import ModelConfig
from megatron.data.blend import blend
from megatron.errors import ConfigError, RunError
from megatron.launch import Launch
from megatron.report.tables import Row
from tests.figures import Figure

CPU = torch.device("cpu")
BENCHMARKS = {
    "attention": attention,
    "communication": communication,
    "flops": flops,
    "engines": engines,
    "gains": gains,
    "head": head,
    "kernels": kernels,
    "launches": launches,
    "starts": starts,
    "startup": startup,
    "train_step": train_step,
    "train_step_gpu": train_step_gpu,
    "train_step_tensor": train_step_tensor,
}
TIMED = ("attention", "engines", "gains", "head", "kernels")
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
def test_what_a_rank_exchanges_does_not_grow_with_the_ranks(quick: Quick, figure: Figure) -> None:
    exchanged, data = quick("starts").tables
    before, first, other = (
        {str(row["what"]): float(str(row[column])) for row in exchanged.rows}
        for column in list(exchanged.rows[0])[1:]
    )
    manifest = "manifest, to all"
    figure("manifest to 384 ranks, MiB a rank", before=before[manifest], after=other[manifest])
    assert before[manifest] > 380 * other[manifest]
    assert all(first[what] <= before[what] and other[what] <= before[what] for what in before)
    times = {row["what"]: (row["times before"], row["times after"]) for row in data.rows}
    assert times["blend computed, CPU s"] == (96, 1)


@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [1, 999, 54321])
def test_former_blend_is_the_blend(num_samples: int) -> None:
    weights = [3.0, 1.0, 0.25, 0.7]
    for former, now in zip(
        starts.former_blend(weights, num_samples), blend(weights, num_samples), strict=True
    ):
        assert former.dtype == now.dtype
        assert former.tolist() == now.tolist()


@pytest.mark.slow
def test_fused_head_needs_less_memory_than_plain_logits(quick: Quick) -> None:
    _, table = quick("head").tables
    memory = {row["contender"]: row["peak MiB"] for row in table.rows}
    assert float(str(memory["fused"])) < float(str(memory["plain"]))


@pytest.mark.slow
def test_both_engines_take_part(quick: Quick) -> None:
    (table,) = quick("engines").tables
    assert [row["engine"] for row in table.rows] == list(engines.ENGINES)


@pytest.mark.slow
def test_tensor_ranks_send_little_more_than_the_least(quick: Quick) -> None:
    (table,) = quick("train_step_tensor").tables
    sent, least = (
        float(str(table.rows[0][name])) for name in ("MiB a rank sends", "MiB in theory")
    )
    assert least < sent < 1.05 * least


@pytest.mark.slow
def test_every_change_of_a_cpu_is_measured_and_those_of_a_gpu_are_predicted(quick: Quick) -> None:
    on_cpu, on_gpu = quick("gains").tables
    assert [row["predicted"] for row in on_cpu.rows] == [c.predicted for c in CPU_CHANGES]
    assert [row["predicted"] for row in on_gpu.rows] == [c.predicted for c in GPU_CHANGES]
    # Layers are compiled where there is a compiler for C++.
    assert all(isinstance(row["measured"], float) for row in on_cpu.rows if row["kept"] != "no")
    assert {row["measured"] for row in on_gpu.rows} == {"not measured"}


def test_every_ablation_belongs_to_a_change_of_a_known_step() -> None:
    changes = [*CPU_CHANGES, *GPU_CHANGES]
    assert {change.ablation for change in changes} == {None, *get_args(Ablation)}
    assert {change.step for change in changes} == set(gains.STEPS)


def test_gain_is_how_many_times_as_long_the_step_takes_without_the_change() -> None:
    times = {"as it is": Times((2.0, 3.0)), "plain head": Times((3.0, 9.0))}
    change = Change("a", "b", "med", "because", 1.1, "plain head")
    assert gains.gain(change, times) == 1.5
    assert gains.gain(replace(change, kept="no"), times) == pytest.approx(2 / 3)
    assert gains.gain(change, {"as it is": times["as it is"]}) == "does not run"
    assert gains.gain(change, {}) == "not measured"
    assert gains.gain(replace(change, ablation=None), times) == "not measured"
    assert gains.row_of(change, times)["median / least"] == 2


def test_operations_are_counted_without_views_and_reservations() -> None:
    x = torch.ones(4, 2)
    with launches.OperationCount() as operations:
        torch.empty_like(x)
        (x.t() @ x).view(4).add_(1)
    assert operations.count == 2


@pytest.mark.slow
def test_gpu_waits_for_the_cpu_at_a_microbatch_of_one_sequence(
    quick: Quick, figure: Figure
) -> None:
    table, smallest = quick("launches").tables
    (row,) = table.rows
    assert (row["model"], row["micro-batch"]) == ("560m", 1)
    assert 24 * int(str(row["operations of a layer"])) < int(str(row["of the model"]))
    # 3.66 GFLOP a token at half of 989.5 TFLOP/s.
    assert row["GPU ms"] == pytest.approx(3.66e9 * 2048 / 494.75e12 * 1000, rel=1e-2)
    assert (float(str(row["GPU / CPU"])) > 1) == (smallest.rows[0]["micro-batch"] == 1)
    figure("issuing an operation", us=row["us to issue one"])


def test_cpu_is_ahead_from_the_first_size_that_takes_the_gpu_longer() -> None:
    rows: list[Row] = [
        {"model": name, "micro-batch": size, "GPU / CPU": ratio}
        for name, size, ratio in [("a", 1, 0.7), ("a", 2, 1.1), ("a", 4, 2.0), ("b", 1, 0.1)]
    ]
    assert list(launches.smallest_ahead(rows)) == [
        {"model": "a", "micro-batch": 2},
        {"model": "b", "micro-batch": "none of these"},
    ]


def test_issue_takes_dispatch_and_launch_of_each_operation() -> None:
    assert launches.Issue(1000, 40, seconds_each=7.5e-6).seconds == pytest.approx(0.01)


def test_contenders_that_compute_something_else_are_refused() -> None:
    check_losses({"a": 1.0, "b": 1.005}, 1.0, 0.01)
    with pytest.raises(RunError, match=r"loss of b is 1\.02, not 1\.0 within 0\.01"):
        check_losses({"a": 1.0, "b": 1.02}, 1.0, 0.01)


def test_contenders_that_fail_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise RuntimeError("no compiler")

    assert list(runnable({"good": list, "bad": fail})) == ["good"]
    assert "bad is left out: no compiler" in capsys.readouterr().err


def test_megatron_core_takes_part_where_it_is_installed_and_can_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(megatron_core, "is_installed", lambda: True)
    assert megatron_core.NAME in contenders.contenders_for("fp32", CPU)
    assert megatron_core.NAME in contenders.contenders_for("bf16", gpu)
    assert megatron_core.NAME not in contenders.contenders_for("bf16", CPU)
    monkeypatch.setattr(megatron_core, "is_installed", lambda: False)
    assert contenders.contenders_for("bf16", gpu) == ["ours", "plain", "transformers"]


def test_first_loss_of_megatron_core_is_that_of_a_guess() -> None:
    megatron_core.check_first_loss(log(MODEL.vocab_size), MODEL)
    with pytest.raises(RunError, match="loss of Megatron-Core is 2"):
        megatron_core.check_first_loss(2.0, MODEL)


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
