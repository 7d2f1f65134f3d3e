"""Tensors in a file without pickle: the safetensors layout, written here, read by the safetensors library.

Written here because the library hides why a write failed, does not fsync, and wants a second copy of what it writes.
Layout: 8 bytes little-endian header length, a JSON header (dtype, shape, offsets), the raw little-endian values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from barlow.errors import UserError
from barlow.files import Block

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class HostCopy:
    """Tensors on the CPU in row-major order, and what that order lost: strides, and names that share one tensor."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    strides: dict[str, list[int]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


def host_copy(tensors: Mapping[str, Tensor], *, own: bool) -> HostCopy:
    """Brings tensors to the CPU, row-major; with ``own`` nothing shares memory with the originals.

    Tied tensors (same memory, same shape and strides) are kept once. Raises TypeError for sparse and other odd ones.
    """
    done = HostCopy()
    first: dict[object, str] = {}
    for name, original in tensors.items():
        tensor = original.detach()
        if tensor.layout != torch.strided or tensor.dtype not in DTYPES:
            raise TypeError(f"tensor {name} is {tensor.layout}, {tensor.dtype}: not one a tensor file holds")
        shape, strides = tuple(tensor.shape), tensor.stride()
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, shape, strides)
        if tensor.numel() and first.setdefault(key, name) != name:
            done.aliases[name] = first[key]
            continue
        if strides != torch.empty(shape, device="meta").stride() and is_dense(shape, strides):
            done.strides[name] = list(strides)
        host = tensor.cpu().contiguous()
        shared = host.data_ptr() == tensor.data_ptr()
        done.tensors[name] = host.clone(memory_format=torch.contiguous_format) if own and shared else host
    return done


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """True when the strides are a permutation of the row-major ones: no hole, no overlap, nothing outside."""
    pairs = sorted(zip(strides, shape, strict=True))
    numel = 1
    for stride, size in pairs:
        if size != 1 and stride != numel:
            return False
        numel *= size
    return all(0 <= stride <= numel for stride, _ in pairs)  # sides of length 1 carry a stride without a meaning


def restride(tensor: Tensor, strides: object) -> Tensor:
    """A copy of ``tensor`` with the strides it had before it was saved. Raises UserError for strides that lie."""
    shape = tuple(tensor.shape)
    if not isinstance(strides, list) or len(strides) != len(shape) or any(type(s) is not int for s in strides):
        raise UserError(f"strides {strides!r} do not fit the shape {list(shape)}")
    if not is_dense(shape, strides):
        raise UserError(f"strides {strides!r} reach outside a tensor of shape {list(shape)}")
    return torch.empty_strided(shape, strides, dtype=tensor.dtype).copy_(tensor)


def tensor_blocks(tensors: Mapping[str, Tensor]) -> Iterator[Block]:
    """The bytes of a file that holds ``tensors`` (on the CPU, row-major, of ``DTYPES``). Same tensors, same bytes."""
    # Widest dtype first keeps every tensor aligned when the file is mapped into memory.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        if tensors[name].numel():
            yield memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) by name; the tensors lie in the mapped file, so copy what outlives the loop.

    Raises UserError when ``path`` is not such a file: a pickle under this name, cut short, or a lying header.
    """
    try:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                if tensor.dtype not in DTYPES:
                    raise TypeError(f"{name} has dtype {tensor.dtype}")
                yield name, tensor
    except (SafetensorError, KeyError, RuntimeError, TypeError) as error:  # the last three: dtypes torch does not know
        raise UserError(f"{path} is not a tensor file ({error}): take another copy of it") from error


def is_finite(tensor: Tensor) -> bool:
    """True when no value is NaN or infinite. One pass without a temporary: the extremes carry both."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = tensor.detach().aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))
