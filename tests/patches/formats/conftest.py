"""One tiny model of each architecture for all tests of formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from overpaint.bases.base import Base
from tests.patches.formats.models import model_folder

ARCHITECTURES = ("1.x", "2.x", "XL")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Base]:
    """Opens the tiny model of an architecture in a dtype; tests do not write into it."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def opened(architecture: str, dtype: torch.dtype) -> Base:
        key = (architecture, dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp("models") / "model"
            made[key] = model_folder(architecture, folder, dtype)
        return Base.open(made[key])

    return opened


@pytest.fixture
def base(model: Callable[[str, torch.dtype], Base]) -> Base:
    """Stable Diffusion 1.x, in full precision."""
    return model("1.x", torch.float32)


@pytest.fixture
def half(model: Callable[[str, torch.dtype], Base]) -> Base:
    """Stable Diffusion 1.x, in half precision."""
    return model("1.x", torch.float16)
