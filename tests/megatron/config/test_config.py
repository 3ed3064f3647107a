"""What follows from the values of a config, and what they must be on a number of ranks.

The messages that a user sees are in tests/integration/wrong_configs.py.
"""

import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RampupConfig,
    TrainConfig,
    config_to_dict,
    load_config,
)
from megatron.errors import ConfigError
from mpu import ParallelDims


def make_model(**changes: Any) -> ModelConfig:
    sizes = {"num_layers": 2, "hidden_size": 48, "num_heads": 4, "vocab_size": 509}
    return ModelConfig(**{**sizes, "seq_length": 16, **changes})


def make_config(*, tensor: int = 1, data: int | None = None, **train: Any) -> Config:
    return Config(
        folder=Path("somewhere"),
        model=make_model(),
        parallel=ParallelConfig(tensor=tensor, data=data),
        train=TrainConfig(
            **{"samples": 64, "global_batch_size": 8, "micro_batch_size": 2, **train}
        ),
    )


def test_sizes_that_follow_from_others() -> None:
    model = make_model()
    assert (model.head_size, model.ffn_size) == (12, 192)
    assert make_model(ffn_hidden_size=100).ffn_size == 100


def test_initial_std_is_that_of_bloom_unless_told() -> None:
    assert make_model().initial_std == math.sqrt(1 / (3 * 48))
    assert make_model(init_std=0.02).initial_std == 0.02


def test_only_gelu_is_not_gated() -> None:
    gated = {name: make_model(activation=name).is_gated for name in ("gelu", "swiglu", "geglu")}
    assert gated == {"gelu": False, "swiglu": True, "geglu": True}


def test_dtypes_are_those_of_torch() -> None:
    found = [make_config(dtype=name).train.torch_dtype for name in ("fp32", "bf16", "fp16", "fp64")]
    assert found == [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize(
    ("world_size", "tensor", "data"), [(1, 1, 1), (2, 2, 1), (2, 1, 2), (8, 2, 4), (4, 4, 1)]
)
def test_data_takes_the_ranks_that_tensor_leaves(world_size: int, tensor: int, data: int) -> None:
    expected = ParallelDims(tensor=tensor, data=data)
    assert make_config(tensor=tensor).layout(world_size) == expected
    assert make_config(tensor=tensor, data=data).layout(world_size) == expected


@pytest.mark.parametrize(
    ("world_size", "tensor", "pipeline", "data"), [(2, 1, 2, 1), (8, 2, 2, 2), (6, 1, 2, 3)]
)
def test_data_takes_the_ranks_that_tensor_and_pipeline_leave(
    world_size: int, tensor: int, pipeline: int, data: int
) -> None:
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    config = replace(make_config(global_batch_size=48), parallel=parallel)
    assert config.layout(world_size) == ParallelDims(tensor=tensor, data=data, pipeline=pipeline)


def test_layout_refuses_ranks_that_the_grid_does_not_fill() -> None:
    with pytest.raises(ConfigError, match=r"parallel.tensor \(2\) must divide .*WORLD_SIZE 3"):
        make_config(tensor=2).layout(3)
    with pytest.raises(ConfigError, match=r"\(2\) x parallel.data \(1\) .*WORLD_SIZE 4"):
        make_config(tensor=2, data=1).layout(4)


def test_layout_refuses_ranks_that_the_pipeline_does_not_fill() -> None:
    config = replace(make_config(), parallel=ParallelConfig(tensor=2, pipeline=2))
    with pytest.raises(
        ConfigError, match=r"parallel.tensor \(2\) x parallel.pipeline \(2\) must divide .* 6\)$"
    ):
        config.layout(6)


def make_pipeline(pipeline: int, **parallel: Any) -> Config:
    """Four microbatches of each step for one data rank."""
    return replace(
        make_config(),
        model=make_model(num_layers=8),
        parallel=ParallelConfig(pipeline=pipeline, **parallel),
    )


def test_every_stage_needs_a_layer_and_a_microbatch() -> None:
    assert make_pipeline(4).layout(4) == ParallelDims(pipeline=4)
    with pytest.raises(ConfigError, match=r"parallel.pipeline \(4\) must not be above .*\(2\)$"):
        make_pipeline(4).layout(8)
    with pytest.raises(ConfigError, match=r"parallel.pipeline \(5\) must not be above .*\(4\)$"):
        make_pipeline(5).layout(5)
    with pytest.raises(ConfigError, match=r"model.num_layers \(8\) must not be below .*stages"):
        make_pipeline(9)
    with pytest.raises(ConfigError, match=r"pipeline \(3\) x parallel.chunks \(3\)$"):
        make_pipeline(3, schedule="interleaved_1f1b", chunks=3)


def test_interleaved_microbatches_come_in_groups_of_the_pipeline() -> None:
    interleaved = {"schedule": "interleaved_1f1b", "chunks": 2}
    assert make_pipeline(2, **interleaved).layout(2) == ParallelDims(pipeline=2)
    with pytest.raises(ConfigError, match=r"microbatches .* \(4\) must be a multiple .* \(3\)"):
        make_pipeline(3, **interleaved).layout(3)
    assert make_pipeline(3).layout(3) == ParallelDims(pipeline=3)


@pytest.mark.parametrize("zero", [0, 1])
def test_schedules_take_the_stages_of_zero_that_they_can(zero: int) -> None:
    for name, chunks in (("1f1b", 1), ("interleaved_1f1b", 2), ("zero_bubble", 1)):
        config = make_pipeline(2, schedule=name, chunks=chunks, zero=zero)
        assert config.parallel.num_stages == 2 * chunks
    with pytest.raises(ConfigError, match=f"parallel.zero 0 or 1, got {zero + 2}"):
        make_pipeline(2, schedule="zero_bubble", zero=zero + 2)


def test_every_batch_of_a_ramp_up_must_be_shared_evenly() -> None:
    rampup = RampupConfig(start=2, increment=2, samples=30)
    config = make_config(rampup=rampup)
    assert list(config.train.batch_sizes()) == [2, 4, 6, 8]
    assert config.layout(1) == ParallelDims()
    with pytest.raises(ConfigError, match=r"every batch of train.rampup \(2\) .* such as 4"):
        config.layout(2)


@pytest.mark.parametrize(
    ("world_size", "train", "parallel", "want"),
    [
        (1, {}, {}, [1, 2, 4, 8, 24]),
        (2, {}, {}, [1, 2, 4, 12]),
        (2, {}, {"tensor": 2}, [1, 2, 4, 8, 24]),
        (24, {}, {}, [1]),
        (1, {"eval_samples": 18}, {}, [1, 2, 6]),
        (1, {"rampup": RampupConfig(start=12, increment=6, samples=9)}, {}, [1, 2, 6]),
        (2, {}, {"pipeline": 2}, [1, 2, 4, 8, 12]),
        (
            2,
            {"global_batch_size": 12},
            {"pipeline": 2, "schedule": "interleaved_1f1b", "chunks": 2},
            [1, 2, 6],
        ),
    ],
)
def test_auto_may_choose_what_the_batches_take(
    world_size: int, train: dict[str, Any], parallel: dict[str, Any], want: list[int]
) -> None:
    config = make_config(**{"global_batch_size": 24, "micro_batch_size": "auto", **train})
    config = replace(config, model=make_model(num_layers=4), parallel=ParallelConfig(**parallel))
    config.layout(world_size)
    assert config.micro_batch_sizes(world_size) == want


def test_auto_is_refused_where_no_size_fits() -> None:
    auto = make_config(global_batch_size=6, micro_batch_size="auto")
    assert auto.layout(3) == ParallelDims(data=3)
    with pytest.raises(ConfigError, match=r"\(6\) .* multiple of the data parallel size \(4"):
        auto.layout(4)


def test_errors_of_a_config_are_those_of_every_rank() -> None:
    with pytest.raises(ConfigError) as caught:
        make_model(num_heads=5)
    assert caught.value.on_every_rank
    assert caught.value.exit_code == 2


def test_config_cannot_be_written() -> None:
    with pytest.raises(FrozenInstanceError):
        make_config().train.samples = 3  # type: ignore[misc]


def test_dictionary_makes_the_same_config_again(tmp_path: Path) -> None:
    config = Config(
        folder=tmp_path,
        model=make_model(init_std=0.1),
        train=TrainConfig(
            samples=64, global_batch_size=8, rampup=RampupConfig(start=4, increment=2, samples=9)
        ),
        data=DataConfig(paths={"a.b/c": 0.25}, split=(1, 0, 0), tokenizer=tmp_path / "t.json"),
    )
    values = config_to_dict(config)
    assert values["data"]["split"] == [1, 0, 0]
    assert values["folder"] == str(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config
