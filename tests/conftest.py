"""What all tests share: a tiny base, and a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from overpaint.bases.base import Base
from overpaint.testing import tiny_base
from overpaint.testing import tiny_pipeline as tiny_pipeline
from overpaint.testing import tiny_tokenizer as tiny_tokenizer
from overpaint.testing.tiny import THINGS as THINGS
from tests.registry.s3_server import BUCKET, s3_server


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base as a diffusers folder, fp16 as published bases are. Tests do not write into it."""
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny").path


@pytest.fixture
def base(base_folder: Path) -> Base:
    """The tiny base, opened."""
    return Base.open(base_folder)


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """The URL of a bucket on a real S3 server, one for the whole run: clients keep connections to the first they meet."""
    if any(find_spec(name) is None for name in ("moto", "s3fs", "flask")):
        pytest.skip('moto and s3fs are not installed; pip install -e ".[dev]" does')
    with pytest.MonkeyPatch.context() as patch, s3_server() as environment:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}"
