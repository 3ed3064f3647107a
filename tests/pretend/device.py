"""A device whose tensors have shapes, dtypes and a place, but no values.

Code that runs inside ``Watch`` may put tensors on the device of ``pretend``. They are torch's fake
tensors; those on the CPU are real, and so are the collectives and files that only they are part of.
Everything that passes the border between the two, and every collective, is noted with its place in
the code:

    a CPU tensor together with one of the device     an error at once, as on a GPU
    a read of a value of the device                  a ``Wait``; the answer is 1, or nothing found
    a copy that does not come from pinned memory     a ``Wait``
    a collective of tensors of the device            a ``Call``, and nothing else
    a collective of CPU tensors                      a ``Call``; carried out where the code is named
                                                     in ``HOST_SIDE``, so that nobody waits for ever

Kernels of GPUs, compiled functions and streams are not tested here: the device is none of CUDA's.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

NAME = "pretended"
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
"""Releases of torch before 2.10 cannot be told of a device by Python."""

HOST_SIDE = ("mpu/data.py", "megatron/together.py", "megatron/training/stopping.py")
"""Files whose collectives are meant to go from CPU to CPU, as are torch's of objects."""

_OF_OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object", "barrier")
_ROOT = f"{Path(__file__).parents[2]}/"
_OURS = ("mpu/", "megatron/", "tests/")
_POINT_TO_POINT = ("send", "recv_")

aten = torch.ops.aten
_READS = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
    aten.equal.default,
}
"""What cannot be computed before the values are there, besides single numbers and copies."""


@dataclass(frozen=True)
class Call:
    """A collective, or one end of a transfer, as one rank asked for it.

    Attributes:
        operation: what torch calls it.
        ranks: of its group.
        devices: kinds of device of the tensors.
        dtypes, sizes: of the tensors.
        options: the reduction, the source, the peer.
        place: in the code.
    """

    operation: str
    ranks: tuple[int, ...]
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    sizes: tuple[int, ...]
    options: tuple[str, ...]
    place: str
    is_host_side: bool

    @property
    def is_transfer(self) -> bool:
        return self.operation in _POINT_TO_POINT

    def __str__(self) -> str:
        tensors = zip(self.devices, self.dtypes, self.sizes, strict=True)
        described = ", ".join(f"{n} {dtype} on {device}" for device, dtype, n in tensors)
        options = f" ({', '.join(self.options)})" if self.options else ""
        return f"{self.operation} of {described}{options} at {self.place}"


@dataclass(frozen=True)
class Wait:
    """The CPU waited for the device.

    Attributes:
        phase: what the test was doing.
        cause: the operation.
        place: in the code.
    """

    phase: str
    cause: str
    place: str

    def __str__(self) -> str:
        return f"{self.phase}: {self.cause} at {self.place}"


class MixedDevicesError(RuntimeError):
    """An operation of tensors of the device and of the CPU."""


class Watch(TorchDispatchMode):
    """Notes what the code inside asks of the device and of other ranks.

    Attributes:
        calls: every collective and transfer, in order.
        waits: every point at which the CPU waited for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.waits: list[Wait] = []
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._phase = "outside"
        self._pinned: dict[int, torch.UntypedStorage] = {}

    def __enter__(self) -> "Watch":
        # Lets torch.tensor(..., device=...) be seen as the copy from the CPU that it is.
        self._only_lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._only_lifts)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Say what the code inside belongs to."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            # Comes again with what this rank holds of it.
            return NotImplemented
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        tensors = _tensors((args, kwargs))
        here = [tensor for tensor in tensors if _is_here(tensor)]
        target = kwargs.get("device")
        if func in (aten._pin_memory.default, aten.is_pinned.default):
            return self._pin(func, args[0])
        if func is aten._to_copy.default:
            return self._to_copy(func, args, kwargs)
        if func is aten.copy_.default:
            return self._copy(func, args, kwargs)
        if not here and (target is None or torch.device(target).type != NAME):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self._wait(func)
            return _answer(args[0].dtype)
        if func in _READS:
            self._wait(func)
            return self._nothing_found(func, args)
        if target is None:
            self._check_one_device(func, tensors)
        with self._fake:
            return func(*args, **kwargs)

    def _collective(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        tensors = _tensors((args, kwargs))
        group, options = _group_and_options((*args, *kwargs.values()))
        devices = tuple(tensor.device.type for tensor in tensors)
        place = _place()
        host_side = NAME not in devices and _is_host_side(place)
        self.calls.append(
            Call(
                operation=func.__name__.split(".")[0],
                ranks=tuple(dist.get_process_group_ranks(group)),
                devices=devices,
                dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors),
                sizes=tuple(tensor.numel() for tensor in tensors),
                options=options,
                place=place,
                is_host_side=host_side,
            )
        )
        if host_side:
            return func(*args, **kwargs)
        with self._fake:
            return func(*args, **kwargs)

    def _to_copy(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        (source,) = args
        target = torch.device(kwargs.get("device") or source.device)
        if target.type == source.device.type:
            with self._fake if _is_here(source) else nullcontext():
                return func(*args, **kwargs)
        if target.type == "cpu":
            self._wait(func)
            dtype = kwargs.get("dtype") or source.dtype
            return torch.full(source.shape, _answer(dtype), dtype=dtype)
        self._check_arrival(func, source, kwargs.get("non_blocking", False))
        dtype = kwargs.get("dtype") or source.dtype
        with self._fake:
            return torch.empty_strided(source.shape, source.stride(), dtype=dtype, device=target)

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        target, source, *rest = args
        if not _is_here(target) and not _is_here(source):
            return func(*args, **kwargs)
        if not _is_here(target):
            self._wait(func)
            return target.fill_(_answer(target.dtype))
        if not _is_here(source):
            non_blocking = kwargs.get("non_blocking", rest[0] if rest else False)
            self._check_arrival(func, source, non_blocking)
        with self._fake:
            return func(*args, **kwargs)

    def _check_arrival(self, func: Any, source: Tensor, non_blocking: bool) -> None:
        if not (non_blocking and source.untyped_storage()._cdata in self._pinned):
            self._wait(func, " from memory that is not pinned" if non_blocking else "")

    def _pin(self, func: Any, tensor: Tensor) -> Any:
        pinned = tensor.untyped_storage()._cdata in self._pinned
        if func is aten.is_pinned.default:
            return pinned
        copy = tensor.clone()
        # Kept, so that no other storage gets its address.
        self._pinned[copy.untyped_storage()._cdata] = copy.untyped_storage()
        return copy

    def _check_one_device(self, func: Any, tensors: list[Tensor]) -> None:
        """Numbers of the CPU go along with what a kernel is started with; tensors cannot."""
        others = [tensor for tensor in tensors if not _is_here(tensor) and tensor.dim() > 0]
        if not others:
            return
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            self._wait(func, " with indices on the CPU")
            return
        raise MixedDevicesError(f"{func} of tensors of two devices at {_place()}")

    def _nothing_found(self, func: Any, args: tuple[Any, ...]) -> Any:
        if func is aten.equal.default:
            return True
        if func is not aten.nonzero.default:
            raise NotImplementedError(f"{func} depends on values; at {_place()}")
        with self._fake:
            return args[0].new_empty((0, args[0].dim()), dtype=torch.int64)

    def _wait(self, func: Any, how: str = "") -> None:
        self.waits.append(Wait(self._phase, f"{func}{how}", _place()))


class _Stream:
    """Stands for a stream, an event and the context of either: all work is done at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def record_event(self, event: object = None) -> "_Stream":
        return _Stream()

    def wait(self, stream: object = None) -> None:
        pass


class _Backend:
    """The module of the device, as torch and FSDP ask for one."""

    Stream = Event = _Stream

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def set_device(self, device: object) -> None:
        pass

    def current_stream(self, device: object = None) -> _Stream:
        return _Stream()

    def stream(self, stream: _Stream | None) -> _Stream:
        return _Stream()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_device_name(self, device: object = None) -> str:
        return NAME


@cache
def pretend() -> torch.device:
    """The device, which this process knows from now on; for ranks of tests only."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())  # type: ignore[no-untyped-call]
    return torch.device(NAME, 0)


def _is_here(tensor: Tensor) -> bool:
    return tensor.device.type == NAME


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _answer(dtype: torch.dtype) -> Any:
    """A value that ends no run."""
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 0


def _group_and_options(arguments: tuple[Any, ...]) -> tuple[ProcessGroup, tuple[str, ...]]:
    group, options = None, []
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject):
            kind = argument._type().name()
            if kind == "ProcessGroup":
                group = ProcessGroup.unbox(argument)
            else:
                options.append(_reduction())
        elif isinstance(argument, int) and not isinstance(argument, bool) and argument >= 0:
            options.append(str(argument))
    assert group is not None
    return group, tuple(options)


def _reduction() -> str:
    """What is reduced by: it is hidden in what torch's dispatcher gets, but not in its caller."""
    options = (frame.f_locals.get("opts") for frame in _frames())
    found = next((it.reduceOp for it in options if hasattr(it, "reduceOp")), None)
    return str(getattr(found, "op", found)).removeprefix("RedOpType.")


def _frames() -> Iterator[FrameType]:
    """The calls that lead here, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_host_side(place: str) -> bool:
    if place.startswith(HOST_SIDE):
        return True
    return any(frame.f_code.co_name in _OF_OBJECTS for frame in _frames())


def _place() -> str:
    """The innermost line of the product, or of a test, that this comes from."""
    for frame in _frames():
        name = frame.f_code.co_filename.removeprefix(_ROOT)
        if name.startswith(_OURS) and not name.startswith("tests/pretend/"):
            return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
    return "torch's own code"
