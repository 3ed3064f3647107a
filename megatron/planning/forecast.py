"""How long a run takes on a cluster: seconds of a step, speed, and days of the whole run.

tokens/s     of a step with the batch at the end of a ramp-up
MFU          model FLOPs utilisation: operations that the model needs with causal attention, of
             what the GPUs could do in that time by their data sheets
days         all steps, each with the batch of its place in the ramp-up; without evaluation,
             saves, and what stands still
"""

from collections import Counter
from dataclasses import dataclass, replace

from megatron.config import Config, RampupConfig
from megatron.model.flops import flops_per_token
from megatron.optim.schedule import batch_plan
from megatron.planning.cluster import Cluster
from megatron.planning.step_time import StepTime, require_16_bits, step_time
from mpu import ParallelDims


@dataclass(frozen=True)
class Forecast:
    """What a run is predicted to take.

    Attributes:
        step: when the batch has grown.
        gpus: that it takes.
        tokens_per_second: of all GPUs together.
        mfu: share of their FLOP/s.
        seconds: of the whole run.
    """

    step: StepTime
    gpus: int
    tokens_per_second: float
    mfu: float
    seconds: float

    @property
    def days(self) -> float:
        return self.seconds / 86400

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.seconds / 3600

    def __str__(self) -> str:
        return (
            f"{self.step.total:.4g} s a step, {self.tokens_per_second:,.0f} tokens/s "
            f"({self.tokens_per_second / self.gpus:,.0f} a GPU), {self.mfu:.1%} MFU; "
            f"{self.days:.3g} days, {self.gpu_hours:,.0f} GPU-hours"
        )


def forecast(config: Config, dims: ParallelDims, cluster: Cluster) -> Forecast:
    """Predict the run of ``config`` on ``cluster``.

    Raises:
        ConfigError: if it does not compute in 16 bits.
    """
    require_16_bits(config)
    step = step_time(config, dims, cluster)
    tokens = config.train.global_batch_size * config.model.seq_length
    flops = tokens * flops_per_token(config.model, "causal")
    steps = Counter(batch_plan(config.train))
    return Forecast(
        step=step,
        gpus=dims.world_size,
        tokens_per_second=tokens / step.total,
        mfu=flops / (step.total * dims.world_size * cluster.peak_flops),
        seconds=sum(
            count * step_time(_with_batch(config, batch), dims, cluster).total
            for batch, count in steps.items()
        ),
    )


def layout_options(config: Config, dims: ParallelDims) -> str:
    """What gives any config this layout, on a command line."""
    parallel, train = config.parallel, config.train
    options = {
        "parallel.tensor": dims.tensor,
        "parallel.pipeline": dims.pipeline,
        "parallel.data": dims.data,
        "parallel.sequence": str(parallel.sequence).lower(),
        "parallel.zero": parallel.zero,
        "parallel.schedule": parallel.schedule,
        "parallel.chunks": parallel.chunks,
        "train.micro_batch_size": train.micro_batch_size,
        "train.recompute": train.recompute,
    }
    return " ".join(f"--{name} {value}" for name, value in options.items())


def _with_batch(config: Config, batch: int) -> Config:
    train = replace(config.train, global_batch_size=batch, rampup=RampupConfig())
    return replace(config, train=train)
