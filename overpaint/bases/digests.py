"""Digests over canonical content (name, dtype, shape, little-endian bytes), never over a container file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def dtype_name(dtype: torch.dtype) -> str:
    """`float16`, `bfloat16`, ...: the spelling digests and manifests use."""
    return str(dtype).removeprefix("torch.")


def raw_bytes(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, without a copy where there is no need of one."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    array: Any = flat.numpy()
    return memoryview(array)


def tensor_digest(name: str, tensor: Tensor) -> str:
    """sha256 of one tensor under its canonical name."""
    digest = hashlib.sha256(tensor_beginning(name, tensor.dtype, tensor.shape))
    digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def tensor_beginning(name: str, dtype: torch.dtype, shape: Sequence[int]) -> bytes:
    """What a tensor's digest is over before its bytes."""
    return canonical_json([name, dtype_name(dtype), list(shape)])


def combined_digest(digests: Mapping[str, str]) -> str:
    """One digest of many tensors: over their names and digests, sorted by name."""
    return hashlib.sha256(canonical_json(dict(digests))).hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one JSON spelling of a value: sorted keys, no spaces, UTF-8. Raises ValueError on NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")
