"""A build that dies leaves nothing under the final name, whenever it dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from overpaint.bases.base import Base
from overpaint.patches.build import build
from tests.checkpoints import single_file
from tests.patches.killed_builds import MOMENTS, terms


@pytest.mark.parametrize("form", ["folder", "single file"])
def test_a_killed_build_leaves_nothing_under_the_final_name(base: Base, tmp_path: Path, form: str) -> None:
    if form == "single file":
        base = single_file(base, tmp_path / "base.safetensors")
    (tmp_path / "builds").mkdir()
    command = [sys.executable, "-m", "tests.patches.killed_builds", str(base.path), str(tmp_path / "builds")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    deaths = json.loads(ran.stdout)
    steps, moments = deaths[:-MOMENTS], deaths[-MOMENTS:]
    # Every step was some build's last, up to the one that none of them reached.
    assert len(steps) > 8
    assert [death["died"] for death in steps] == [True] * (len(steps) - 1) + [False]
    # Only the last step, which makes the name itself durable, comes after the name.
    assert [death["found"] for death in steps] == ["nothing"] * (len(steps) - 2) + ["whole"] * 2
    assert all(death["found"] in ("nothing", "whole") for death in moments)
    # What is left is recognisable, and in nobody's way.
    left = [path.name for path in (tmp_path / "builds").iterdir()]
    assert {name for name in left if name.endswith(".partial")}
    out = tmp_path / "builds" / ("step-0.safetensors" if base.is_single_file else "step-0")
    assert Base.open(build(base, terms(), out).path).names == base.names
