"""How the engine on DeepSpeed is built: the model, its marks, the optimizer, and DeepSpeed itself.

Before DeepSpeed gets a model, each parameter is told what ShardSpec says, in DeepSpeed's words:

    model_parallel       its gradient counts for the norm on this rank; what is not cut over the
                         tensor ranks counts on the first of them
    ds_pipe_replicated   it is the copy of a tied weight, which does not count

What each tensor rank has a part of the gradient of, is summed up in a hook.
"""

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import Init, register_external_parameter
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import set_z3_leaf_modules
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import AdamW

from megatron.config import Backend, Config, OptimizerConfig, deepspeed_values, nvme_options
from megatron.engine.deepspeed.grid import Grid
from megatron.errors import ConfigError
from megatron.model.init import build_model
from megatron.model.language_model import BloomForPretraining
from megatron.model.placement import Placement
from megatron.model.stages import build_stages
from megatron.model.transformer import ParallelTransformerLayer
from mpu import ParallelGroups, set_shard_spec, shard_spec

logger = logging.getLogger(__name__)


def prepare_model(
    config: Config,
    placement: Placement,
    groups: ParallelGroups,
    device: torch.device,
    backend: Backend,
) -> BloomForPretraining:
    """The stage of this rank, its parameters of any value; at ZeRO 3 cut over the data ranks."""
    _prepare_process(device)
    _check_machine(config)
    model = build_model(
        config.model,
        placement,
        device=torch.device("meta"),
        backend=backend,
        recompute=config.train.recompute,
        stage=build_stages(config.model, config.parallel)[groups.pipeline.rank()],
    )
    if config.parallel.zero == 3:
        _partition(model, _options(config, groups), groups, device)
    else:
        _materialise(model, device)
    for parameter in model.parameters():
        _mark(parameter, groups)
    return model


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> AdamW:
    """AdamW as the other engine has it; DeepSpeed puts stretches of its own in the place of these.

    Learning rates are set at each step.
    """
    kinds: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in parameters:
        kinds[len(shard_spec(parameter).shape) == 1].append(parameter)
    decayed, others = kinds
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def initialize(
    config: Config, groups: ParallelGroups, module: nn.Module, optimizer: AdamW
) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine, around a model or a pipeline stage. Collective."""
    engine: deepspeed.DeepSpeedEngine
    # Parts of DeepSpeed print, on every rank.
    with redirect_stdout(StringIO()) as printed, _options_named():
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=_options(config, groups),
            # A pipeline stage brings its own.
            mpu=Grid(groups) if groups.pipeline.size() == 1 else None,
            dist_init_required=False,
        )
    logger.debug("DeepSpeed: %s", printed.getvalue())
    return engine


@contextmanager
def _options_named() -> Iterator[None]:
    """Raise what DeepSpeed does not take of its options as ConfigError."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"engine.deepspeed: DeepSpeed refuses {name} ({first['input']}): {first['msg']}",
            on_every_rank=True,
        ) from error


def _options(config: Config, groups: ParallelGroups) -> dict[str, Any]:
    options = deepspeed_values(
        config.engine, config.parallel, config.train, config.optimizer, groups.data.size()
    )
    if config.parallel.zero == 0:
        # Clipped by the engine itself; see there.
        options["gradient_clipping"] = 0.0
    return options


def _prepare_process(device: torch.device) -> None:
    """Set what DeepSpeed keeps for the whole process."""
    deepspeed_logger.setLevel(logging.WARNING)
    # DeepSpeed still calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    # Of no use in training, and compiled at the first use of a CPU, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Takes the process groups that are there.
    deepspeed.init_distributed(verbose=False)


def _check_machine(config: Config) -> None:
    """Refuse what DeepSpeed cannot do on this machine.

    Raises:
        ConfigError: naming the option and what is missing.
    """
    if config.train.dtype == "fp16" and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            "engine.name deepspeed: this processor does not compute in train.dtype fp16"
        )
    for option in nvme_options(config.engine):
        if not get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible():
            raise ConfigError(
                f"{option} nvme: DeepSpeed needs the library libaio, and what compiles against it "
                "(Debian: apt-get install libaio-dev)"
            )


def _materialise(module: nn.Module, device: torch.device) -> None:
    """Give parameters that are on the meta device memory on ``device``."""
    for part in module.modules():
        for name, old in list(part.named_parameters(recurse=False)):
            if old.is_meta:
                new = nn.Parameter(torch.zeros_like(old, device=device))
                set_shard_spec(new, shard_spec(old))
                part.register_parameter(name, new)


def _partition(
    model: BloomForPretraining,
    options: dict[str, Any],
    groups: ParallelGroups,
    device: torch.device,
) -> None:
    """Cut the parameters over the data ranks, part by part: the whole is on no rank at any time."""
    layers = list(model.language_model.transformer.layers.values())
    for part in (*layers, model):
        _materialise(part, device)
        with _options_named():
            Init(
                module=part,
                data_parallel_group=groups.data,
                mpu=Grid(groups),
                config_dict_or_path=options,
                dtype=model.placement.dtype,
            )
    # A layer reads parameters of its parts itself, and the model the word embedding.
    set_z3_leaf_modules(model, [ParallelTransformerLayer], raise_if_not_found=False)
    if model.stage.last:
        register_external_parameter(model, model.head_weight)


def _mark(parameter: nn.Parameter, groups: ParallelGroups) -> None:
    """Tell DeepSpeed of a parameter what ShardSpec says; see above."""
    spec = shard_spec(parameter)
    parameter.model_parallel = spec.is_main_replica(groups)  # type: ignore[attr-defined]
    parameter.ds_pipe_replicated = spec.tied_copy  # type: ignore[attr-defined]
    if spec.sum_gradient and groups.tensor.size() > 1:
        parameter.register_hook(partial(_summed, group=groups.tensor))


def _summed(gradient: Tensor, group: ProcessGroup) -> Tensor:
    total = gradient.float()
    dist.all_reduce(total, group=group)
    return total.to(gradient.dtype)
