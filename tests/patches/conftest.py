"""A diffusion transformer, and a patch for its text inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from overpaint.bases.base import Base
    from overpaint.patches.compose import Term


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A random FLUX.1, tiny, as a diffusers folder. Tests do not write into it."""
    from overpaint.bases.base import Base
    from tests.bases.tiny_transformers import tiny_transformer

    folder = tmp_path_factory.mktemp("flux")
    tiny_transformer("flux").save_pretrained(folder)
    return Base.open(folder)


@pytest.fixture(scope="session")
def term(flux: Base) -> Term:
    """A text map of one direction at each of its text inputs."""
    import torch

    from overpaint.patches.compose import Term
    from overpaint.patches.delta import TextMap

    rng = torch.Generator().manual_seed(0)
    widths = {each: flux.columns(each, flux.projections(each)[0]) for each in flux.text_inputs}
    maps = [TextMap(each, *torch.randn(2, at.stop - at.start, 1, generator=rng) / 3) for each, at in widths.items()]
    return Term("a", sum(maps[1:], start=maps[0]))
