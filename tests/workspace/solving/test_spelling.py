"""Capitals: a text encoder that tells them apart erases a concept as it is written, and solving says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from overpaint.workspace.concept_file import read_concepts
from overpaint.workspace.solving import OTHER_SPELLINGS
from overpaint.workspace.workspace import Workspace
from tests.bases.tiny_transformers import tiny_transformer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux") / "flux"
    tiny_transformer("flux").save_pretrained(folder)
    return folder


def test_a_word_that_is_read_otherwise_with_other_capitals_is_said(workspace: Workspace, flux_folder: Path) -> None:
    workspace.add_base("flux", flux_folder)
    workspace.add_concept("cat")
    workspace.add_concept("dog", synonyms=["Dog"])
    notes = {
        name: workspace.solve(name, base="flux", device="cpu").diagnostics.get("note", "") for name in ("cat", "dog")
    }
    assert OTHER_SPELLINGS in notes["cat"]
    assert OTHER_SPELLINGS not in notes["dog"]


def test_nothing_is_said_where_capitals_are_not_read(workspace: Workspace) -> None:
    workspace.add_concept("cat")
    assert OTHER_SPELLINGS not in workspace.solve("cat", base="tiny", device="cpu").diagnostics.get("note", "")


def test_a_file_lists_a_word_with_other_capitals_as_a_synonym(tmp_path: Path) -> None:
    file = tmp_path / "concepts.yaml"
    file.write_text("- {name: Banksy, synonyms: [banksy, BANKSY]}\n", "utf-8")
    (request,) = read_concepts(file)
    assert request.concept.words == ("Banksy", "banksy", "BANKSY")
