"""The example notebook runs from the top, in a kernel of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "recipe-in-a-notebook.ipynb"


def test_the_example_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("anywidget", reason="it shows a widget: pip install 'overpaint[notebook]'")
    nbclient = pytest.importorskip("nbclient", reason="notebooks are run by nbmake: pip install 'overpaint[dev]'")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLE.parents[1]))
    notebook = nbformat.read(EXAMPLE, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    assert "<td>cat</td>" in shown[0]["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in shown[1]
    assert "<td>cat</td>" not in shown[2]["text/html"]
    assert "<td>pistol</td>" in shown[2]["text/html"]
