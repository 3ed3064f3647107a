"""What a run tells: log lines, metrics.jsonl, TensorBoard."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron.config import Config, config_to_dict
from megatron.data.summary import DatasetSummary
from megatron.engine.base import StepResult
from megatron.launch import Launch
from megatron.model.flops import count_parameters, flops_per_token, peak_flops
from megatron.optim.schedule import batch_plan
from megatron.training.callbacks import Callback
from megatron.training.metrics import (
    EvalMetrics,
    MetricsWriter,
    StepMetrics,
    Window,
    data_lines,
    duration,
    eval_line,
    log_line,
)
from megatron.training.metrics_file import numbered
from megatron.training.progress import Progress
from megatron.tuning.memory import peak_bytes

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"


class Reporter:
    """Tells of steps and evaluations, on rank 0; on the others it does nothing.

    Making one changes nothing; ``start`` does.

    Args:
        guard: called before anything is written; raises if the folder belongs to another run.
        bytes_per_token: of the text behind the evaluated tokens, if it is known.
        datasets: what the run reads.
        callbacks: are told too, on every rank.

    Attributes:
        last_step, last_evaluation: what was told last.
    """

    def __init__(
        self,
        config: Config,
        launch: Launch,
        start: Progress,
        guard: Callable[[], None] = lambda: None,
        bytes_per_token: float | None = None,
        datasets: Sequence[DatasetSummary] = (),
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.last_step: StepMetrics | None = None
        self.last_evaluation: EvalMetrics | None = None
        self._datasets = datasets
        self._callbacks = callbacks
        self._config = config
        self._launch = launch
        self._total_steps = start.step + sum(
            1 for _ in batch_plan(config.train, start.consumed_samples)
        )
        self._flops_per_token = flops_per_token(config.model, "causal")
        self._bytes_per_token = bytes_per_token
        self._device = _device_name(launch.device)
        self._peak_flops = peak_flops(self._device, config.train.torch_dtype)
        self._window = Window()
        self._started = time.perf_counter()
        self._writer = MetricsWriter(
            config.folder,
            tensorboard=config.log.tensorboard,
            enabled=launch.rank == 0,
            resume_step=start.step,
            guard=guard,
        )

    def start(self) -> None:
        """Tell of the start, and leave the config in the run folder for people and ``--config``:
        as ``config.yaml``, and under a number of its own.

        Raises:
            DiskError: if a file cannot be written; none has changed then.
        """
        parameters = count_parameters(self._config.model)
        dims = self._launch.groups.dims
        parallel = self._config.parallel
        layout = {**vars(dims), "sequence": parallel.sequence, "zero": parallel.zero}
        logger.info(
            "%s parameters, %d %s (tensor %d x pipeline %d x data %d) on %s, engine %s, "
            "%s, %d steps",
            f"{parameters:,}",
            self._launch.world_size,
            "rank" if self._launch.world_size == 1 else "ranks",
            dims.tensor,
            dims.pipeline,
            dims.data,
            self._device,
            self._config.engine.name,
            self._config.train.dtype,
            self._total_steps,
        )
        for line in data_lines(self._datasets):
            logger.info("%s", line)
        values = config_to_dict(self._config)
        about: dict[str, Any] = {
            "world_size": self._launch.world_size,
            "layout": layout,
            "device": self._device,
            "parameters": parameters,
            "torch": torch.__version__,
            "data": [vars(dataset) for dataset in self._datasets],
            "config": values,
        }
        folder, text = self._config.folder, yaml.safe_dump(values, sort_keys=False).encode()
        names = (numbered(folder, "config-", ".yaml"), folder / CONFIG_FILE)
        self._writer.write_start(about, dict.fromkeys(names, text))

    def nothing_to_do(self, progress: Progress, complete: bool) -> None:
        """Tell why a run at ``progress`` trains no further."""
        if complete:
            logger.info("complete: %s; raise train.samples to go on", self._far(progress))
        else:
            stop, far = self._config.train.stop_at_step, self._far(progress)
            logger.info("stopped at train.stop_at_step %s: %s; raise it to go on", stop, far)

    def done(self, progress: Progress, complete: bool, save: Path | None) -> None:
        """Tell that the run has come to its end, or to train.stop_at_step."""
        what = "complete" if complete else "stopped at train.stop_at_step"
        seconds = time.perf_counter() - self._started
        logger.info("%s: %s, after %s", what, self._far(progress), duration(seconds))
        if save is not None:
            folder = self._config.folder
            logger.info(
                "newest save %s; to look at the run, bloom report %s; to sample from it, "
                "bloom generate %s --prompt ...",
                *(save, folder, folder),
            )

    def _far(self, progress: Progress) -> str:
        return (
            f"step {progress.step} of {self._total_steps}, "
            f"{progress.consumed_samples} of {self._config.train.samples} samples"
        )

    def saved(self, progress: Progress, path: Path) -> None:
        """Tell of the save at ``progress``."""
        self._writer.write_save(progress.step)
        for callback in self._callbacks:
            callback.on_save(progress.step, path)

    def step(
        self, progress: Progress, result: StepResult, lr: float, batch_size: int, seconds: float
    ) -> None:
        """Tell of the step that led to ``progress`` and took ``seconds``."""
        seq_length = self._config.model.seq_length
        tokens_per_second = batch_size * seq_length / seconds
        flops = tokens_per_second * self._flops_per_token / self._launch.world_size
        metrics = StepMetrics(
            step=progress.step,
            consumed_samples=progress.consumed_samples,
            consumed_tokens=progress.consumed_tokens,
            loss=result.loss,
            learning_rate=lr,
            grad_norm=result.grad_norm,
            global_batch_size=batch_size,
            skipped=result.skipped,
            loss_scale=result.loss_scale,
            skipped_steps=result.skipped_steps,
            step_seconds=seconds,
            tokens_per_second=tokens_per_second,
            tflops_per_device=flops / 1e12,
            mfu=None if self._peak_flops is None else flops / self._peak_flops,
            elapsed_seconds=time.perf_counter() - self._started,
            peak_memory_bytes=peak_bytes(self._launch.device),
        )
        self._writer.write_step(metrics)
        self._window.add(metrics)
        if progress.step % self._config.log.interval == 0 or progress.step == self._total_steps:
            logger.info(
                log_line(
                    self._window.summarize(),
                    total_steps=self._total_steps,
                    total_samples=self._config.train.samples,
                )
            )
            self.flush()
        self.last_step = metrics
        for callback in self._callbacks:
            callback.on_step(metrics)

    def evaluation(self, progress: Progress, split: str, loss: float) -> None:
        """Tell of an evaluation after ``progress``."""
        bits = None
        if self._bytes_per_token is not None:
            bits = loss / math.log(2) / self._bytes_per_token
        metrics = EvalMetrics(
            step=progress.step,
            consumed_samples=progress.consumed_samples,
            split=split,
            loss=loss,
            bits_per_byte=bits,
        )
        self._writer.write_eval(metrics)
        self.flush()
        logger.info(eval_line(metrics))
        if not math.isfinite(loss):
            logger.warning(
                "step %d: the %s loss is %s, not a finite number", progress.step, split, loss
            )
        self.last_evaluation = metrics
        for callback in self._callbacks:
            callback.on_evaluation(metrics)

    def flush(self) -> None:
        """Let all that was told outlast this process; before a save, which resumes from here."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _device_name(device: torch.device) -> str:
    return "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
