"""What is in `examples/` beside scripts and packages with tests of their own: a notebook, and a compose file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from tests.docs.pages import ROOT

EXAMPLES = ROOT / "examples"


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads((EXAMPLES / "first_steps.ipynb").read_text("utf-8"))["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("nbmake") is None or find_spec("ipykernel") is None, reason="nbmake is not installed")
def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = tmp_path / "first_steps.ipynb"
    notebook.write_text((EXAMPLES / notebook.name).read_text("utf-8"), "utf-8")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--nbmake",  # the repository's own settings, which leave this plug-in out, do not reach a folder elsewhere
            "--nbmake-timeout=900",
            notebook.name,
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compose_file_is_one_and_keeps_no_password() -> None:
    text = (EXAMPLES / "team" / "docker-compose.yml").read_text("utf-8")
    services = yaml.safe_load(text)["services"]
    assert {"database", "bucket"} <= services.keys()
    for name, service in services.items():
        assert service["image"], name
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), "nobody else's machine reaches a database that a tutorial starts"
        for key, value in service["environment"].items():
            if re.search("PASSWORD|MC_HOST", key):
                assert "${OVERPAINT_PASSWORD:?" in value, (name, key)
    named = {volume.partition(":")[0] for service in services.values() for volume in service.get("volumes", ())}
    assert named == yaml.safe_load(text)["volumes"].keys()


def test_the_layout_is_that_of_its_page_and_passes_its_own_test() -> None:
    page = (ROOT / "docs" / "adding-a-layout.md").read_text("utf-8")
    shown = [json.loads(block) for block in re.findall(r"```json\n(.+?)```", page, re.DOTALL)]
    assert shown == [
        json.loads((EXAMPLES / "layout" / f"{name}.json").read_text("utf-8")) for name in ("example", "example-text")
    ]
    names: dict[str, object] = {"__file__": str(EXAMPLES / "layout" / "test_example.py")}
    exec((EXAMPLES / "layout" / "test_example.py").read_text("utf-8"), names)
    tests = [test for name, test in names.items() if name.startswith("test_") and callable(test)]
    assert len(tests) == 2
    for test in tests:
        test()
