"""Count the bytes of the tensors that are alive, on any device, even where there is no memory.

Tensors of the meta device have shapes and no values. What a computation on them allocates, keeps
and frees is what it would on a GPU, so that a model of any size can be counted on a laptop.
"""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Inside ``with LiveBytes() as live``, counts the storages that operations make.

    Views count once, with what they are views of.

    Args:
        besides: tensors whose storages do not count.

    Attributes:
        now: bytes alive.
        peak: most bytes that were alive at once, since the last ``take_peak``.
    """

    def __init__(self, besides: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in besides}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return out

    def take_peak(self) -> int:
        """Return ``peak``, and begin a new one."""
        peak, self.peak = self.peak, self.now
        return peak

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
