"""The microbatches of a step or an evaluation, on every rank that needs them."""

from collections.abc import Iterator, Sequence

import torch

from megatron.config import Config
from megatron.data.content import Findings
from megatron.data.history import Phase
from megatron.data.loader import MicrobatchLoader, Split, build_samples
from megatron.data.samples import Samples
from megatron.data.text_bytes import bytes_per_token
from megatron.launch import Launch
from megatron.model.inputs import ModelInputs, build_inputs
from mpu import broadcast_batch

_NAMES = ("tokens", "samples")


def reads_data(launch: Launch) -> bool:
    """Whether this rank reads data; else another of its tensor group does."""
    return launch.groups.tensor.rank() == 0


class BatchReader:
    """Microbatches of one split.

    The first rank of each tensor group reads the data and the others get it from there.

    Args:
        num_samples: that will be read, from the first on, or the phases of the run, see
            ``build_samples``; for 0, the split may be empty.
        eod_id: the end-of-document token, if the tokenizer is known.
        findings: what is known of the data.

    Raises:
        DataError: if the data cannot be used.
    """

    def __init__(
        self,
        config: Config,
        launch: Launch,
        split: Split,
        num_samples: int | Sequence[Phase],
        eod_id: int | None,
        findings: Findings | None = None,
    ) -> None:
        self._config = config
        self._launch = launch
        self._eod_id = eod_id
        self._weight_dtype = torch.float64 if config.train.dtype == "fp64" else torch.float32
        needed = num_samples if isinstance(num_samples, int) else num_samples[-1].num_samples
        self._num_samples = needed
        self._samples: Samples | None = None
        self._loader: MicrobatchLoader | None = None
        if reads_data(launch) and needed > 0:
            self._samples = build_samples(config, split, num_samples, findings)
            data = launch.groups.data
            self._loader = MicrobatchLoader(self._samples, data.rank(), data.size())

    def bytes_per_token(self) -> float | None:
        """Bytes of text behind one token that is predicted, in all samples that will be read.

        None if they are not known, or this rank does not read data.

        Raises:
            DataError: if what says so is damaged.
        """
        if self._samples is None:
            return None
        return bytes_per_token(self._samples, self._num_samples)

    def read(
        self, consumed_samples: int, batch_size: int, micro_batch: int
    ) -> Iterator[ModelInputs]:
        """This data rank's microbatches of the ``batch_size`` samples after ``consumed_samples``.

        Collective over the tensor group, each time the iterator advances.

        Args:
            micro_batch: samples in each.
        """
        data_size = self._launch.groups.dims.data
        batches: Iterator[dict[str, torch.Tensor] | None]
        if self._loader is not None:
            batches = iter(self._loader.read(consumed_samples, batch_size, micro_batch))
        else:
            batches = iter([None] * (batch_size // (micro_batch * data_size)))
        return map(self._prepare, batches)

    def _prepare(self, batch: dict[str, torch.Tensor] | None) -> ModelInputs:
        group, device = self._launch.groups.tensor, self._launch.device
        batch = broadcast_batch(batch, _NAMES, group=group, device=device)
        return build_inputs(
            batch["tokens"],
            batch["samples"],
            self._config.data,
            self._eod_id,
            self._weight_dtype,
        )
