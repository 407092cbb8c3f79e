"""An accelerator without one: a device that computes on the CPU, and whose tensors do not mix with the CPU's, as on a GPU.

A tensor on it keeps a CPU tensor that holds its values ("raw"). Each operation runs on the raw ones, after a look at where its arguments
are: with arguments from both sides it fails, unless CUDA would take them (a number, an index). What copies to the host is counted.

PyTorch's PrivateUse1 device, set up for a backend in Python, can be registered once in a process and changes what PyTorch says of
accelerators. So this is for a process of its own (`tests/accelerator/runs.py`).
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


class _Module:
    """What PyTorch wants to know of a device."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None:  # draws are the CPU's
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False


_setup_privateuseone_for_python_backend("emulated", backend_module=_Module())
torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay of the subclass
DEVICE = torch.device("emulated:0")

copies: Counter[str] = Counter()
"""Copies to the host so far, by the function of the package that asked for them; those that other libraries ask for are not counted."""

HOST_ANSWERS = ("aten::_local_scalar_dense", "aten::equal")
"""Operations whose result is a number of Python's."""
SIZED_BY_VALUES = ("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim")
"""Operations whose result's size the host has to wait for."""


def _copied() -> None:
    frames = [
        frame
        for frame in traceback.extract_stack()
        if not any(part in frame.filename for part in ("/torch/", "/tests/"))
    ]
    if "/shapedpo/" in frames[-1].filename:
        copies[f"{frames[-1].filename.split('/shapedpo/')[-1]}:{frames[-1].name}"] += 1


class EmulatedTensor(torch.Tensor):
    """A tensor on the device."""

    raw: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> EmulatedTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), raw.stride(), raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )
        tensor.raw = raw
        return tensor

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})

    def __repr__(self) -> str:
        return f"{self.raw!r} on {DEVICE}"

    # These go past the dispatcher, or make tensors where it is off.

    def tolist(self) -> Any:
        _copied()
        return self.raw.tolist()

    def numpy(self, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_as_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_as_tensors(index), value)


def _as_tensors(index: Any) -> tuple[Any, ...]:
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(
        torch.tensor(part, dtype=None if part else torch.long) if isinstance(part, list) else part for part in parts
    )


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, EmulatedTensor) else value


def _wrapped(value: Any) -> Any:
    return EmulatedTensor(value) if isinstance(value, torch.Tensor) else value


def _check(name: str, args: tuple[Any, ...], tensors: list[torch.Tensor]) -> None:
    """Fails where arguments are on both sides."""
    host = [tensor for tensor in tensors if not isinstance(tensor, EmulatedTensor) and tensor.dim()]
    if name.startswith("aten::index") and isinstance(args[0], EmulatedTensor) and isinstance(args[1], list | tuple):
        allowed = [part for part in args[1] if isinstance(part, torch.Tensor)]  # CUDA takes indices from the host
        host = [tensor for tensor in host if not any(tensor is part for part in allowed)]
    if host:
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, found {[tuple(tensor.shape) for tensor in host]} on "
            f"the host beside {DEVICE}."
        )


def _run(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name, device = op._schema.name, kwargs.get("device")
    if name == "aten::copy_":
        if not isinstance(args[0], EmulatedTensor):
            _copied()
        _raw(args[0]).copy_(_raw(args[1]))
        return args[0]
    if name == "aten::_to_copy":
        target = args[0].device if device is None else torch.device(device)
        if target.type == "cpu":
            _copied()
        found = op(_raw(args[0]), **{**kwargs, "device": torch.device("cpu")})
        return found if target.type == "cpu" else EmulatedTensor(found)
    flat, spec = pytree.tree_flatten((args, kwargs))
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    _check(name, args, tensors)
    by_truth = name.startswith("aten::index") and any(
        isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in pytree.tree_leaves(args[1:2])
    )
    if name in HOST_ANSWERS or name in SIZED_BY_VALUES or by_truth:
        _copied()
    raw = [torch.device("cpu") if isinstance(value, torch.device) else _raw(value) for value in flat]
    raw_args, raw_kwargs = pytree.tree_unflatten(raw, spec)
    found = op(*raw_args, **raw_kwargs)
    if name in HOST_ANSWERS or (device is not None and torch.device(device).type == "cpu"):
        return found
    found = pytree.tree_map(_wrapped, found)
    if any(argument.alias_info is not None for argument in op._schema.arguments):  # views, and operations in place
        return return_and_correct_aliasing(op, args, kwargs, found)
    return found


_aten, _rest = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
_aten.impl(
    "empty.memory_format", lambda size, dtype=None, **_: EmulatedTensor(torch.empty(size, dtype=dtype)), "PrivateUse1"
)
_aten.impl(
    "empty_strided",
    lambda size, stride, dtype=None, **_: EmulatedTensor(torch.empty_strided(size, stride, dtype=dtype)),
    "PrivateUse1",
)
_rest.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")


@contextlib.contextmanager
def default() -> Iterator[None]:
    """Training and loading choose the device, as they would a GPU; `torch.tensor` and the like can make tensors on it."""
    from accelerate.state import AcceleratorState, PartialState
    from transformers import TrainingArguments

    def on_device(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            return make(*args, **kwargs) if device is None else make(*args, **kwargs).to(device)

        return made

    with contextlib.ExitStack() as stack:
        for name in ("tensor", "as_tensor", "arange", "randperm"):
            stack.enter_context(mock.patch.object(torch, name, on_device(getattr(torch, name))))
        choice = property(lambda arguments: arguments._setup_devices and DEVICE)
        stack.enter_context(mock.patch.object(TrainingArguments, "device", choice))
        stack.enter_context(mock.patch.object(PartialState, "default_device", property(lambda state: DEVICE)))
        for state in (AcceleratorState, PartialState):
            state._reset_state()
            stack.callback(state._reset_state)
        yield
