"""The microbatches of a step or an evaluation, on every rank that needs them."""

from collections.abc import Iterator, Sequence

import torch

from megatron.config import Config
from megatron.data.history import Phase
from megatron.data.loader import MicrobatchLoader, Split, build_samples
from megatron.launch import Launch
from megatron.model.inputs import ModelInputs, build_inputs
from mpu import broadcast_batch

_NAMES = ("tokens", "samples")


class BatchReader:
    """Microbatches of one split.

    The first rank of each tensor group reads the data and the others get it from there.

    Args:
        num_samples: that will be read, from the first on; for 0, the split may be empty.
        eod_id: the end-of-document token, if the tokenizer is known.
        phases: how the samples have been read so far, see ``build_samples``.

    Raises:
        DataError: if the data cannot be used.
    """

    def __init__(
        self,
        config: Config,
        launch: Launch,
        split: Split,
        num_samples: int,
        eod_id: int | None,
        phases: Sequence[Phase] = (),
    ) -> None:
        self._config = config
        self._launch = launch
        self._eod_id = eod_id
        self._weight_dtype = torch.float64 if config.train.dtype == "fp64" else torch.float32
        self._loader: MicrobatchLoader | None = None
        if launch.groups.tensor.rank() == 0 and num_samples > 0:
            samples = build_samples(config, split, num_samples, phases)
            data = launch.groups.data
            self._loader = MicrobatchLoader(samples, data.rank(), data.size())

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
