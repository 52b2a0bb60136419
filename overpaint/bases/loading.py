"""How PyTorch is used: independent of the caller's settings, on a chosen device, and quietly while models are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from overpaint.core.errors import OverpaintError
from overpaint.core.names import shown

_SMALLEST = 5e-324
"""Compares as zero where the processor takes numbers below the normal range for zero."""


@contextmanager
def own_torch_settings() -> Iterator[None]:
    """Within the block, PyTorch computes as if freshly started, whatever its caller has set.

    That is: no autocast, new tensors on the CPU and in float32, products of float32 in float32, and small numbers kept. The
    caller's settings come back afterwards. Also a decorator. What is set already is not set again, so that nesting is cheap.
    """
    with ExitStack() as block:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                block.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            block.enter_context(torch.device("cpu"))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            torch.set_default_dtype(torch.float32)
            block.callback(torch.set_default_dtype, dtype)
        if _SMALLEST == 0:
            torch.set_flush_denormal(False)
            block.callback(torch.set_flush_denormal, True)
        _multiply_exactly(block)
        yield


def _multiply_exactly(block: ExitStack) -> None:
    """Products of float32 matrices in float32 until the block ends."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set backend by backend, as PyTorch allows since 2.9
        backends: list[Any] = [torch.backends.mkldnn, torch.backends.cuda]
        for matmul in (backend.matmul for backend in backends):
            block.callback(setattr, matmul, "fp32_precision", matmul.fp32_precision)
            matmul.fp32_precision = "ieee"
    else:
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
            block.callback(torch.set_float32_matmul_precision, precision)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Within the block, transformers and diffusers report errors only and draw no bars."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries: tuple[Any, ...] = (of_diffusers, of_transformers)
    kept = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, kept, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def resolve_device(wanted: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one. Raises OverpaintError for a device this machine or PyTorch does not have."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError, ValueError) as error:
        raise OverpaintError(f"unknown device {shown(wanted)}; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OverpaintError("--device cuda was asked for, but PyTorch finds no CUDA device here; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise OverpaintError(f"the device {wanted!r} is not supported; use cpu or cuda")
    return device
