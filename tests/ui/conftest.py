"""What Gradio leaves behind in the process that serves a page."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator

import pytest

GRADIO = [
    # It counts its requests with an option and a keyword of pandas that are on their way out, in a thread of its own.
    pytest.mark.filterwarnings("ignore:.*no_silent_downcasting.*"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated.*"),
    # It makes event loops and never closes them.
    pytest.mark.filterwarnings("ignore:unclosed (event loop|<socket).*:ResourceWarning"),
]
"""Marks of tests that serve the page."""


@pytest.fixture(scope="package", autouse=True)
def collected() -> Iterator[None]:
    """Gradio's loops are collected here and not in somebody else's test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
