"""The training run: build the parts, and then step, evaluate and save until it is done."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing

import torch.distributed as dist

from megatron.config import Config
from megatron.data.content import Findings
from megatron.data.history import Phase
from megatron.data.loader import Split
from megatron.data.summary import summarize
from megatron.engine.base import Engine
from megatron.engine.build import build_engine, check_engine
from megatron.errors import ConfigError, NonFiniteError, StoppedOnRequestError
from megatron.launch import Launch, RankEnvironment, launched, read_environment
from megatron.log import setup_logging
from megatron.optim.loss_scaler import only_skips
from megatron.optim.schedule import global_batch_size, learning_rate
from megatron.peers import during
from megatron.spokesman import Spokesman
from megatron.stopping import NOTHING_CHANGED, StopSignals
from megatron.together import run_everywhere, run_on_first
from megatron.tokenizer import Tokenizer, load_tokenizer
from megatron.training.batches import BatchReader, reads_data
from megatron.training.callbacks import Callback, TrainResult
from megatron.training.changes import run_phases, saved_choices
from megatron.training.data_identity import agree_on_data
from megatron.training.findings import compare_findings, find_orders, read_data
from megatron.training.finite import find_not_finite
from megatron.training.replicas import check_replicas
from megatron.training.reporter import Reporter
from megatron.training.run_folder import check_run_folder
from megatron.training.run_lock import RunLock, held
from megatron.training.saving import RunCheckpoints, open_newest
from megatron.training.stopping import agreed
from megatron.tuning.attention import choose_backend
from megatron.tuning.micro_batch import EngineTrial, choose_micro_batch

logger = logging.getLogger(__name__)


class Trainer:
    """Trains as ``config`` says. Every rank makes one and calls ``train``.

    Args:
        callbacks: are told of steps, evaluations and saves.
    """

    def __init__(self, config: Config, callbacks: Sequence[Callback] = ()) -> None:
        self.config = config
        self.callbacks = callbacks

    def train(
        self, signals: StopSignals | None = None, spokesman: Spokesman | None = None
    ) -> TrainResult:
        """Train from the newest save, or from the start, to the end or ``train.stop_at_step``.

        Args:
            signals: those that the program heeds; None heeds them for as long as it trains.
            spokesman: the one that the program ends with; None is one like it.

        Raises:
            StoppedOnRequestError: after saving, if a signal asked the run to stop.
            RunError: of another kind, for anything else that ends a run early.
        """
        if signals is None:
            with StopSignals() as own:
                return self.train(own, spokesman)
        environment = read_environment()
        setup_logging(environment.rank)
        check_engine(self.config)
        folder = self.config.folder
        with (
            launched(self.config.layout, self.config.launch, environment, spokesman) as launch,
            ExitStack() as parts,
        ):
            with during("the start"):
                run_on_first(lambda: check_run_folder(folder), dist.group.WORLD)
                lock = parts.enter_context(held(folder))
                if lock is not None:
                    signals.before_leaving(lock.release)
                run = _Run(self.config, launch, environment, lock, self.callbacks)
                parts.enter_context(closing(run))
            signals.only_note()
            return run.go(signals)


class _Run:
    """The parts of a run on this rank. Collective, from its making on.

    Making it checks all that can be refused, and changes nothing in the run folder; ``go`` does.
    """

    def __init__(
        self,
        config: Config,
        launch: Launch,
        environment: RankEnvironment,
        lock: RunLock | None,
        callbacks: Sequence[Callback],
    ) -> None:
        world = dist.group.WORLD
        guard = _no_guard if lock is None else lock.check
        self._config = config
        self._launch = launch
        tokenizer = run_everywhere(lambda: _load_tokenizer(config), world)
        newest = open_newest(config)
        # Before the model is built: what is wrong with the data is known soon.
        findings = read_data(config, reads=reads_data(launch), group=world)
        data = agree_on_data(config, findings, tokenizer, newest, world)
        consumed = 0 if newest is None else newest.progress.consumed_samples
        phases = run_phases(config, newest, same_data=data.is_same)
        needed = _needed_samples(config, phases)
        findings = find_orders(config, needed, findings, reads=reads_data(launch), group=world)
        self._train_data, self._valid_data = run_everywhere(
            lambda: _open_data(config, launch, needed, tokenizer, findings), world
        )
        compare_findings(findings, world)
        saved = saved_choices(config, newest)
        attention = choose_backend(config, launch.device, saved, group=world)
        self._engine: Engine = run_everywhere(
            lambda: build_engine(config, launch, environment, attention.backend), world
        )
        micro_batch = choose_micro_batch(
            config,
            launch,
            saved,
            lambda: EngineTrial(
                config, launch, self._engine, self._train_data.read, group=world, first=consumed
            ),
            group=world,
        )
        self._micro_batch = micro_batch.size
        choices = {
            **attention.to_state(),
            **micro_batch.to_state(),
            **data.to_state(),
            "phases": [vars(phase) for phase in phases],
        }
        self._checkpoints = RunCheckpoints(config, launch, self._engine, tokenizer, choices, guard)
        with during("the start" if newest is None else f"loading {newest.path}"):
            self._progress = self._checkpoints.resume(newest)
        self._saved_step = self._progress.step
        self._save_path = None if newest is None else newest.path
        bytes_per_token = run_on_first(self._valid_data.bytes_per_token, world)
        datasets = run_on_first(lambda: summarize(config, findings), world)
        self._reporter = run_everywhere(
            lambda: Reporter(
                config, launch, self._progress, guard, bytes_per_token, datasets, callbacks
            ),
            world,
        )

    def go(self, signals: StopSignals) -> TrainResult:
        """Step until the run is done, or is to stop."""
        if self._is_done():
            self._reporter.nothing_to_do(self._progress, self._is_complete())
            return self._result()
        if self._is_to_stop(signals):
            raise StoppedOnRequestError(NOTHING_CHANGED, on_every_rank=True)
        with during("the start"):
            run_everywhere(self._reporter.start, dist.group.WORLD)
            self._checkpoints.set_damaged_aside()
        train = self._config.train
        while not self._is_done():
            self._step()
            step = self._progress.step
            if _is_due(step, train.eval_interval) or (train.eval_interval and self._is_complete()):
                self._evaluate()
            if _is_due(step, self._config.checkpoint.save_interval):
                self._save()
            elif _is_due(step, train.replica_check_interval):
                self._check_state()
            # A run that is done has nothing left to stop.
            if not self._is_done() and self._is_to_stop(signals):
                self._save()
                saved = "is saved" if self._saved_step == step else "needs no save"
                raise StoppedOnRequestError(
                    f"stopped on request after step {step}, which {saved}", on_every_rank=True
                )
        if self._only_skips():
            raise NonFiniteError(
                f"{self._no_update()}; train longer, or with a lower train.loss_scale.initial",
                on_every_rank=True,
            )
        self._save()
        self._reporter.done(self._progress, self._is_complete(), self._save_path)
        return self._result()

    def _result(self) -> TrainResult:
        reporter = self._reporter
        return TrainResult(
            self._progress,
            self._is_complete(),
            reporter.last_step,
            reporter.last_evaluation,
            self._save_path,
        )

    def _is_to_stop(self, signals: StopSignals) -> bool:
        with self._launch.waiting(f"the end of step {self._progress.step}"):
            return agreed(signals.received)

    def close(self) -> None:
        self._reporter.close()

    def _is_complete(self) -> bool:
        """Whether the next batch would go beyond the samples of the run."""
        consumed = self._progress.consumed_samples
        return consumed + self._batch_size() > self._config.train.samples

    def _is_done(self) -> bool:
        stop = self._config.train.stop_at_step
        return self._is_complete() or (stop is not None and self._progress.step >= stop)

    def _batch_size(self) -> int:
        return global_batch_size(self._progress.consumed_samples, self._config.train)

    def _step(self) -> None:
        started = time.perf_counter()
        batch_size = self._batch_size()
        microbatches = self._train_data.read(
            self._progress.consumed_samples, batch_size, self._micro_batch
        )
        self._progress = self._progress.after(batch_size, self._config.model.seq_length)
        lr = learning_rate(
            self._progress.consumed_samples, self._config.optimizer, self._config.train.samples
        )
        try:
            with self._launch.waiting(f"step {self._progress.step}"):
                result = self._engine.train_step(microbatches, lr)
        except NonFiniteError as error:
            found = self._find_not_finite()
            cause = "" if found is None else f"; before it already, {found}"
            message = f"step {self._progress.step}: {error}{cause}"
            raise NonFiniteError(message, on_every_rank=error.on_every_rank) from error
        seconds = time.perf_counter() - started
        self._reporter.step(self._progress, result, lr, batch_size, seconds)

    def _evaluate(self) -> None:
        """The same samples each time, so that the losses of a run can be compared."""
        samples = self._config.train.eval_samples
        with self._launch.waiting(f"the evaluation after step {self._progress.step}"):
            loss = self._engine.evaluate(self._valid_data.read(0, samples, self._micro_batch))
        self._reporter.evaluation(self._progress, "valid", loss)

    def _save(self) -> None:
        """Save the state, if it is not saved yet and something has been learnt on the way to it."""
        if self._progress.step == self._saved_step:
            return
        if self._only_skips():
            logger.warning("step %d is not saved: %s", self._progress.step, self._no_update())
            return
        # What is saved goes on for ever.
        self._check_state()
        self._reporter.flush()
        with during(f"the save of step {self._progress.step}"):
            self._save_path = self._checkpoints.save(self._progress)
        self._saved_step = self._progress.step
        self._reporter.saved(self._progress, self._save_path)

    def _check_state(self) -> None:
        """Look at all weights and moments: whether they are numbers, and copies equal."""
        found = self._find_not_finite()
        if found is not None:
            message = f"after step {self._progress.step}, {found}; {self._newest_save()}"
            raise NonFiniteError(message, on_every_rank=True)
        self._check_replicas()

    def _check_replicas(self) -> None:
        with self._launch.waiting(f"the replica check after step {self._progress.step}"):
            check_replicas(self._engine, self._launch.groups)

    def _find_not_finite(self) -> str | None:
        with self._launch.waiting(f"the check of all numbers after step {self._progress.step}"):
            return find_not_finite(
                self._engine.state(), self._engine.device, group=dist.group.WORLD
            )

    def _only_skips(self) -> bool:
        """Whether the state is not saved yet, and nothing came of the steps that led to it."""
        is_saved = self._progress.step == self._saved_step
        return not is_saved and only_skips(self._engine.scalars(), self._config.train.loss_scale)

    def _no_update(self) -> str:
        scale = self._engine.scalars()["loss_scale"]
        return (
            f"all of the last steps overflowed and were skipped, down to a loss scale of "
            f"{scale:g}; {self._newest_save()}"
        )

    def _newest_save(self) -> str:
        if self._saved_step == 0:
            return "nothing is saved yet"
        return f"the newest save is of step {self._saved_step}"


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _no_guard() -> None:
    """The other ranks write nothing of their own accord."""


def _load_tokenizer(config: Config) -> Tokenizer | None:
    if config.data.tokenizer is None:
        return None
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size ({config.model.vocab_size}) must not be below the "
            f"{tokenizer.vocab_size} tokens of data.tokenizer {config.data.tokenizer}"
        )
    return tokenizer


def _needed_samples(config: Config, phases: Sequence[Phase]) -> dict[Split, Sequence[Phase]]:
    """The samples of each split. Those that are evaluated are the same however a run goes on."""
    return {
        "train": phases,
        "valid": [Phase(0, config.model.seq_length, config.train.eval_samples)],
    }


def _open_data(
    config: Config,
    launch: Launch,
    needed: Mapping[Split, Sequence[Phase]],
    tokenizer: Tokenizer | None,
    findings: Findings,
) -> list[BatchReader]:
    eod_id = None if tokenizer is None else tokenizer.eod_id
    return [
        BatchReader(config, launch, split, phases, eod_id, findings)
        for split, phases in needed.items()
    ]
