"""A dry run counts what the run holds: compared with engines that really train."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import mpu.collectives
from megatron.config import Config
from megatron.engine.torch_engine import TorchEngine
from megatron.errors import ConfigError
from megatron.model.flops import count_parameters
from megatron.model.inputs import ModelInputs
from megatron.planning.absent_peers import absent_peers
from megatron.planning.cluster import cluster_of
from megatron.planning.communication import sent_per_step
from megatron.planning.count import Count, StateBytes, allowance, count, pass_shape
from megatron.planning.forecast import forecast
from megatron.planning.live_bytes import LiveBytes
from megatron.planning.parameters import META
from megatron.planning.pass_bytes import meta_microbatch
from megatron.planning.report import DryRunRequest, dry_run_report, take_request
from mpu.collectives import Pending
from mpu.products import main_grad
from tests.distributed import run_ranks
from tests.figures import Figure
from tests.megatron.engine.training import Layout, build_engine, make_config, microbatches

LAYOUTS: list[tuple[Layout, Literal["bf16", "fp32"]]] = [
    (Layout(tensor=2, sequence=True), "bf16"),
    (Layout(pipeline=2), "fp32"),
    (Layout(data=2, zero=1), "bf16"),
    (Layout(data=2, zero=2), "bf16"),
    (Layout(pipeline=2, data=2, zero=3, schedule="interleaved_1f1b", chunks=2), "fp32"),
    (Layout(tensor=2, pipeline=2, data=2, zero=1, schedule="zero_bubble", tied=False), "bf16"),
]


def on_cpu(config: Config) -> Config:
    return replace(config, launch=replace(config.launch, device="cpu"))


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS, ids=str)
def test_state_bytes_are_those_of_the_run(layout: Layout, dtype: Literal["bf16", "fp32"]) -> None:
    config = on_cpu(make_config(layout, dtype))
    live = run_ranks(layout.world_size, train_and_count, config)
    first_ranks = live[:: layout.data * layout.tensor]
    assert [rank.state for rank in count(config).ranks] == first_ranks


def train_and_count(config: Config) -> StateBytes:
    """What the tensors of this rank take after a step."""
    engine, groups = build_engine(config)
    engine.train_step(microbatches(config, 0, groups), 1e-3)
    parameters = [parameter for model in engine.models for parameter in model.parameters()]
    gradients = [main_grad(parameter) for parameter in parameters]
    if config.parallel.zero >= 2:
        gradients = [parameter.grad for parameter in parameters]
    held = [tensor for state in engine._optimizer.state.values() for tensor in state.values()]
    mains = [main for group in engine._optimizer.param_groups for main in group["params"]]
    weights = storages(parameters)
    others = storages(mains + [tensor for tensor in held if tensor.dim() > 0])
    return StateBytes(
        weights=sum(weights.values()),
        gradients=sum(storages(g for g in gradients if g is not None).values()),
        optimizer=sum(size for key, size in others.items() if key not in weights),
    )


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Sizes by address."""
    locals_ = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    held = (tensor.untyped_storage() for tensor in locals_)
    return {storage.data_ptr(): storage.nbytes() for storage in held}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(recompute="full"),
        Layout(tensor=2, sequence=True, recompute="selective"),
    ],
    ids=str,
)
def test_activations_are_those_of_a_step_on_the_cpu(layout: Layout, figure: Figure) -> None:
    config = on_cpu(make_config(layout, "fp32"))
    (rank,) = count(config).ranks
    live = run_ranks(layout.world_size, train_and_watch, config)[0]
    error = (rank.activations + rank.working) / live - 1
    figure("dry run: activations against a step on the CPU", error=abs(error))
    assert abs(error) < 0.02


def train_and_watch(config: Config) -> int:
    """Most bytes that a step needs besides the state and its samples."""
    engine, groups = build_engine(config)
    batches = microbatches(config, 0, groups)
    engine.train_step(batches, 1e-3)
    with what_is_sent_dropped_at_once(), LiveBytes(besides=known(engine, batches)) as live:
        engine.train_step(batches, 1e-3)
    return live.peak


@contextmanager
def what_is_sent_dropped_at_once() -> Iterator[None]:
    """Let collectives return only when gloo's thread has dropped its tensors, a moment later."""

    def patient(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: object, **kwargs: object) -> object:
            result = collective(*args, **kwargs)
            time.sleep(0.003)
            return result

        return call

    def wait(pending: Pending) -> Tensor:
        patient(pending.work.wait)()
        return pending.finish(pending.out)

    gather = patient(mpu.collectives._all_gather_single)
    with (
        mock.patch.object(Pending, "wait", wait),
        mock.patch("mpu.collectives._all_gather_single", gather),
    ):
        yield


def known(engine: TorchEngine, batches: Iterable[ModelInputs]) -> list[Tensor]:
    """The state, and the samples."""
    parameters = [parameter for model in engine.models for parameter in model.parameters()]
    gradients = [g for parameter in parameters if (g := main_grad(parameter)) is not None]
    moments = [value for state in engine._optimizer.state.values() for value in state.values()]
    inputs = [value for batch in batches for value in vars(batch).values() if value is not None]
    return [*parameters, *gradients, *moments, *inputs]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(pipeline=4),
        Layout(pipeline=4, schedule="zero_bubble"),
        Layout(pipeline=2, schedule="interleaved_1f1b", chunks=2),
    ],
    ids=str,
)
def test_activations_are_those_of_the_whole_schedule(
    layout: Layout, figure: Figure, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between GPUs, what is sent arrives soon, and is then dropped.
    sent = mock.Mock(**{"is_completed.return_value": True})
    monkeypatch.setattr(dist, "isend", lambda *args, **kwargs: sent)
    config = on_cpu(make_config(layout, "fp32"))
    found = count(config)
    for place, rank in enumerate(found.ranks):
        executed = most_of_all_microbatches(config, found, place)
        error = (rank.activations + rank.working) / executed - 1
        figure("dry run: activations against the whole schedule", error=abs(error))
        assert abs(error) < 0.02, place


def most_of_all_microbatches(config: Config, found: Count, place: int) -> int:
    """Most bytes of the passes of a step, executed on the meta device from first to last."""
    with absent_peers(found.dims, place) as groups:
        engine = TorchEngine(config, groups, META, "blocked")
        batches = [meta_microbatch(pass_shape(config)) for _ in range(found.microbatches)]
        with LiveBytes(besides=known(engine, batches)) as live:
            engine._forward_backward(batches, 1.0)
        return live.peak


def test_parameters_count_once_at_every_layout() -> None:
    for layout, dtype in LAYOUTS:
        config = make_config(layout, dtype)
        assert count(config).parameters == count_parameters(config.model)


def test_each_zero_stage_holds_less() -> None:
    totals, working = [], []
    for zero in (0, 1, 2, 3):
        (rank,) = count(make_config(Layout(data=2, zero=zero), "bf16")).ranks
        totals.append(rank.state.total)
        working.append(rank.working)
    assert totals == sorted(totals, reverse=True)
    # What stage 2 gathers at once, stage 3 gathers layer by layer.
    assert working[0] < working[3] < working[2]


def test_nothing_of_the_absent_peers_stays() -> None:
    count(make_config(Layout(pipeline=2)))
    assert not dist.is_initialized()


def test_options_that_need_a_device_or_a_package_are_accepted() -> None:
    config = make_config(
        Layout(tensor=2, sequence=True), "bf16", layernorm="apex", optimizer="apex_adamw"
    )
    config = replace(
        config,
        model=replace(config.model, attention_backend="flex", attention_dropout=0.0),
        parallel=replace(config.parallel, symmetric_memory=True),
    )
    assert count(config).parameters == count_parameters(config.model)


def test_attention_on_gpus_keeps_no_scores() -> None:
    def activations(**changes: Any) -> int:
        config = make_config(Layout(), "bf16")
        model = replace(config.model, attention_dropout=0.0, seq_length=512)
        return count(replace(config, model=model, **changes)).ranks[0].activations

    launch = make_config(Layout()).launch
    on_gpu, on_a_cpu = activations(), activations(launch=replace(launch, device="cpu"))
    # Blocks of 128 queries keep 10/16 of the scores, in fp32: samples x heads x layers.
    scores = 1 * 4 * 4 * 512 * 512 * 10 // 16 * 4
    assert on_gpu < on_a_cpu - scores * 0.9


@pytest.fixture(scope="module")
def found() -> Count:
    layout = Layout(pipeline=2, data=2, zero=1, micro_batch=1)
    return count(make_config(layout, "bf16"))


def test_what_does_not_fit_is_an_error_that_names_stage_and_bytes(found: Count) -> None:
    enough = (found.fullest.total + allowance(found.config)) / 2**30
    found.check_fits(enough)
    with pytest.raises(ConfigError) as error:
        found.check_fits(enough * 0.99)
    message = str(error.value)
    assert f"layers {found.fullest.layers}" in message
    assert f"{found.fullest.total:,} bytes" in message
    assert "4 GiB beside them" in message


def test_report_has_a_row_for_each_rank_of_the_pipeline(found: Count) -> None:
    lines = dry_run_report(found, memory=None).splitlines()
    heading = next(index for index, line in enumerate(lines) if "optimizer" in line)
    rows = [line.split() for line in lines[heading + 1 : heading + 3]]
    assert [row[0] for row in rows] == ["0", "1"]
    assert f"{found.ranks[0].parameters:,}" in rows[0]
    assert f"{found.parameters:,} parameters" in lines[0]
    assert "fits" not in lines[heading]


def test_report_has_the_traffic_of_each_axis(found: Count) -> None:
    sent = sent_per_step(found.config, found.dims)
    (line,) = (line for line in dry_run_report(found, None).splitlines() if line.startswith("sent"))
    for axis in ("pipeline", "data", "embedding"):
        assert f"{axis} {sent[axis]:,}" in line
    assert "tensor" not in line


def test_report_says_who_fits(found: Count) -> None:
    totals = sorted(rank.total for rank in found.ranks)
    between = sum(totals) / 2 + allowance(found.config)
    report = dry_run_report(found, memory=between / 2**30)
    assert sorted(line.split()[-1] for line in report.splitlines() if line[-3:] in ("yes", " no"))
    assert report.count(" yes\n") == report.count(" no\n") == 1


def test_flag_is_taken_out_of_the_arguments() -> None:
    rest = ["--config", "run.yaml", "--optimizer.lr", "-1", "--data.paths", '{"a b": 1}']
    assert take_request(rest) == (None, rest)
    for flag, memory in (
        (["--dry_run"], None),
        (["--dry_run", "80"], 80),
        (["--dry_run=0.5"], 0.5),
    ):
        for place in (0, 2, len(rest)):
            request, options = take_request([*rest[:place], *flag, *rest[place:]])
            assert (request, options) == (DryRunRequest(memory), rest)


def test_cluster_belongs_to_the_dry_run() -> None:
    found = take_request(["--cluster", "h100", "--dry_run", "--config", "run.yaml"])
    assert found == (DryRunRequest(None, "h100"), ["--config", "run.yaml"])
    alone = ["--cluster", "h100", "--config", "run.yaml"]
    assert take_request(alone) == (None, alone)
    with pytest.raises(ConfigError, match="--cluster must be one of a100, h100, h200, got 'h10'"):
        take_request(["--dry_run", "--cluster", "h10"])


def test_report_says_how_long_it_takes_on_a_cluster(found: Count) -> None:
    cluster = cluster_of("h100", found.dims.world_size)
    expected = forecast(found.config, found.dims, cluster)
    assert f"time      {expected}\n" in dry_run_report(found, 80, cluster)
    assert "time      with --cluster a100, h100, h200\n" in dry_run_report(found, 80)


@pytest.mark.parametrize("value", ["run.yaml", "0", "-1", "nan", "inf"])
def test_memory_that_is_no_number_above_zero_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=f"--dry_run .* got '{value}'"):
        take_request([f"--dry_run={value}"])


def test_live_bytes_count_storages_as_long_as_they_live() -> None:
    given = torch.empty(100, device="meta")
    with LiveBytes(besides=[given]) as live:
        given.view(10, 10)
        assert live.now == 0
        a = given + 1
        view = a.view(10, 10)
        b = a * 2
        assert live.now == 800
        del a
        assert live.now == 800
        del view, b
        assert live.now == 0
        assert live.take_peak() == 800
        assert live.take_peak() == 0
