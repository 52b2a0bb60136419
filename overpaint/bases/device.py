"""Which device computes."""

from __future__ import annotations

import torch

from overpaint.errors import OverpaintError


def resolve_device(wanted: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one. Raises OverpaintError for a device this machine or PyTorch does not have."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise OverpaintError(f"unknown device {wanted!r}; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OverpaintError("--device cuda was asked for, but PyTorch finds no CUDA device here; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise OverpaintError(f"the device {wanted!r} is not supported; use cpu or cuda")
    return device
