"""Which device computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from overpaint.core.errors import OverpaintError

# Loading models without the libraries' own progress bars and hints; the caller's settings come back afterwards.


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
    except RuntimeError as error:
        raise OverpaintError(f"unknown device {wanted!r}; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OverpaintError("--device cuda was asked for, but PyTorch finds no CUDA device here; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise OverpaintError(f"the device {wanted!r} is not supported; use cpu or cuda")
    return device
