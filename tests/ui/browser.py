"""Chromium for the tests of pages: Debian's, or the one that Playwright brought."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

REQUIRED = "OVERPAINT_CHROMIUM"
"""Set to "required" where no test that needs a browser may be skipped."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window; skips the test, with the reason, where there is none."""
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        try:
            # In a container, without a kernel's namespaces, its sandbox cannot start; it opens our own page only.
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
            )
        except Error as error:
            reason = f"no Chromium: {str(error).splitlines()[0]}; `make chromium` installs it"
            if os.environ.get(REQUIRED) == "required":
                pytest.fail(reason)
            pytest.skip(reason)
        try:
            yield browser
        finally:
            browser.close()
