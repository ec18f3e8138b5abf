"""A GPU that is pretended: tensors on the device `meta` whose values lie on the CPU.

What the code does differently off the CPU then runs without a GPU. As on one, tensors of two devices do not mix, and what would
make the host wait for the GPU is recorded. Compiled kernels do not run here: they want addresses.
"""

from __future__ import annotations

import contextlib
import sys

import torch
import torch._dynamo  # which keeps the functions of torch that it finds when it is imported, and must not find the patched ones
from torch._library.custom_ops import OPDEFS
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "meta"
# As on a GPU: results whose size or value the host must know, and copies between the two unless they are said to be non-blocking;
# one to the GPU must come from pinned memory, too.
_HOST_WAITS = {f"aten::{name}" for name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount")}
_HOST_WAITS |= {"aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave"}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}  # by a mask, the host counts it
_MIXES_DEVICES = {"aten::copy_", *_INDEXING}  # indices may lie on the CPU
_WIDER = {f"aten::{name}.dtype{out}" for name in ("mm", "addmm") for out in ("", "_out")}  # which torch has for CUDA only


class _Pretended(torch.Tensor):
    """A tensor that says it lies on DEVICE."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, values.size(), **layout, device=DEVICE)
        tensor.values = values
        return tensor

    def __repr__(self, *, tensor_contents=None):
        return f"pretended({self.values!r})"

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        raise RuntimeError(f"{op} on a pretended GPU outside of `with PretendedGpu()`")


class PretendedGpu(TorchDispatchMode):
    """While active, `device="meta"` means the pretended GPU. `waits`: the operations so far that make the host wait for it;
    `launches`: how many kernels it was given, about one for each operation that is no view."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.launches = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if op._schema.name in OPDEFS:  # an op of ours: its own code, on pretended tensors
            with self:
                return OPDEFS[op._schema.name]._init_fn(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = [isinstance(x, _Pretended) for x in tensors]
        device = kwargs.get("device")
        to_gpu, to_host = (device is not None and torch.device(device).type == kind for kind in (DEVICE, "cpu"))
        if not any(on_gpu) and not to_gpu:
            return op(*args, **kwargs)
        name = op._schema.name
        mixed = any(on_gpu) and any(x.dim() and not there for x, there in zip(tensors, on_gpu, strict=True))
        if mixed and name not in _MIXES_DEVICES:
            raise RuntimeError(f"Expected all tensors to be on the same device, got cpu and {DEVICE} in {op}")
        if self._waits(name, tensors, on_gpu, to_host, args, kwargs):
            self.waits.append(name)
        self.launches += not (op.is_view or name.startswith(("aten::empty", "aten::new_empty", "aten::detach")))
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        inner_args, inner_kwargs = tree_map(lambda x: x.values if isinstance(x, _Pretended) else x, (args, kwargs))
        if name in ("aten::addmm", "aten::addmm_"):
            _check_lengths(op, inner_args, inner_kwargs)
        wider = op.name() in _WIDER
        values = _multiply(op, inner_args, inner_kwargs) if wider else op(*inner_args, **inner_kwargs)
        if name == "aten::copy_":
            return args[0]
        out = values if to_host else tree_map(lambda x: _Pretended(x) if isinstance(x, torch.Tensor) else x, values)
        return return_and_correct_aliasing(op, args, kwargs, out)

    @staticmethod
    def _waits(name: str, tensors: list, on_gpu: list, to_host: bool, args: tuple, kwargs: dict) -> bool:
        if name == "aten::copy_" and on_gpu[0] != on_gpu[1]:
            queued = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            return not (on_gpu[0] and queued and getattr(args[1], "pinned", False))
        if name == "aten::_to_copy":
            return to_host or not (on_gpu[0] or (kwargs.get("non_blocking", False) and getattr(args[0], "pinned", False)))
        masks = name in _INDEXING and any(x.dtype in (torch.bool, torch.uint8) for x in tensors[1:])
        return masks or name in _HOST_WAITS


def _given(op, args, kwargs) -> dict:
    return dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs


def _check_lengths(op, args, kwargs):
    """torch adds a product to one row by cuBLASLt, unless its right factor is a row or a column, too; that refuses a matrix, be it
    of one row, whose rows are longer than its stride."""
    given = _given(op, args, kwargs)
    left, right = given["mat1"], given["mat2"]
    by_lt = given["self"].squeeze().dim() == 1 and min(right.shape) > 1
    if by_lt and left.is_contiguous() and left.stride(0) < left.shape[1]:
        raise RuntimeError(f"cuBLASLt refuses rows of {left.shape[1]} with a stride of {left.stride(0)} in {op}")


def _multiply(op, args, kwargs):
    """mm or addmm with `out_dtype`: operands are widened, then multiplied."""
    given = _given(op, args, kwargs)
    dtype = given["out_dtype"]
    left, right = (given.get("mat1", given["self"]), given["mat2"])
    result = given.get("alpha", 1) * (left.to(dtype) @ right.to(dtype))
    if "mat1" in given and given.get("beta", 1):
        result += given.get("beta", 1) * given["self"].to(dtype)
    return given["out"].copy_(result) if "out" in given else result


@contextlib.contextmanager
def pretend(monkeypatch):
    """A PretendedGpu, and what torch must be told of its device: autocast is off there, and fused optimizers run."""
    enabled, autocast = torch.is_autocast_enabled, torch.autocast
    fused = [*_foreach_utils._get_fused_kernels_supported_devices(), DEVICE]

    def put_there(from_data):
        def there(data, *, device=None, **options):
            made = from_data(data, **options)
            return made if device is None else made.to(device)

        return there

    def autocast_unless_pretended(device_type, *args, **options):
        return contextlib.nullcontext() if device_type == DEVICE else autocast(device_type, *args, **options)

    def pin_memory(tensor):
        copy = tensor.clone()
        copy.pinned = True
        return copy

    with monkeypatch.context() as patch, PretendedGpu() as gpu:
        patch.setattr(torch.Tensor, "pin_memory", pin_memory)  # which asks for a real one
        for from_data in (torch.tensor, torch.as_tensor):  # which torch makes without asking the mode
            patch.setattr(torch, from_data.__name__, put_there(from_data))
        patch.setattr(torch, "is_autocast_enabled", lambda device_type="cpu": device_type != DEVICE and enabled(device_type))
        patch.setattr(torch, "autocast", autocast_unless_pretended)
        patch.setattr(_Pretended, "tolist", lambda x: gpu.waits.append("tolist") or x.values.tolist(), raising=False)
        for module in (_foreach_utils, *(sys.modules[cls.__module__] for cls in (torch.optim.Optimizer, torch.optim.Adam))):
            if hasattr(module, "_get_fused_kernels_supported_devices"):
                patch.setattr(module, "_get_fused_kernels_supported_devices", lambda: fused)
        yield gpu
