"""The learning rate and the batch size, as functions of the samples consumed."""

import math
from collections.abc import Iterator

from megatron.config import OptimizerConfig, TrainConfig


def learning_rate(samples: int, config: OptimizerConfig, train_samples: int) -> float:
    """Learning rate of the step that brings the consumed samples to ``samples``.

    It grows linearly over the warm-up to ``lr``, decays until ``decay_samples``, and stays there:

        linear        min + (lr - min) (1 - r)
        cosine        min + (lr - min) (1 + cos(pi r)) / 2
        inverse_sqrt  lr sqrt(warmup / samples), at least min, however long
        constant      lr

    with r the share of the decay that is done.

    Args:
        train_samples: length of the run, where ``config.decay_samples`` is None.
    """
    warmup = config.warmup_samples
    if samples <= warmup:
        return config.lr * samples / warmup
    if config.decay == "constant":
        return config.lr
    if config.decay == "inverse_sqrt":
        return max(config.min_lr, config.lr * math.sqrt(max(warmup, 1) / samples))
    end = train_samples if config.decay_samples is None else config.decay_samples
    done = min(1.0, (samples - warmup) / max(1, end - warmup))
    left = 1 - done if config.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left


def global_batch_size(consumed_samples: int, config: TrainConfig) -> int:
    """Samples in the step that starts after ``consumed_samples``.

    During the ramp-up the batch grows by one increment after each equal share of its samples.
    """
    rampup = config.rampup
    if rampup.start == 0 or consumed_samples > rampup.samples:
        return config.global_batch_size
    increments = (config.global_batch_size - rampup.start) // rampup.increment
    if increments == 0:
        return config.global_batch_size
    samples_each = rampup.samples / increments
    done = min(increments, int(consumed_samples / samples_each))
    return rampup.start + done * rampup.increment


def batch_plan(config: TrainConfig, consumed: int = 0) -> Iterator[int]:
    """The batch of every step after ``consumed`` samples, up to one that would go beyond the run.

    A run that goes on with other batches than it began with has made other steps before.
    """
    while consumed + (batch := global_batch_size(consumed, config)) <= config.samples:
        yield batch
        consumed += batch
