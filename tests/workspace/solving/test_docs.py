"""The page about solving many says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from overpaint.core.concepts import Concept
from overpaint.workspace.concept_file import CONCEPT_KEYS, DEFAULT_KEYS, read_concepts

PAGE = (Path(__file__).parents[3] / "docs" / "solving-many.md").read_text("utf-8")


@pytest.mark.usefixtures("counting")
def test_the_example_is_read(tmp_path: Path) -> None:
    file = tmp_path / "concepts.yaml"
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    file.write_text(example)
    umbrella, sunflower, watercolor, parrot = read_concepts(file)
    assert umbrella.concept == Concept("umbrella")
    assert sunflower.concept.phrases == (
        ("a field of {} blossoms", "sunflower"),
        ("{} in a vase", "sunflower"),
        ("{} in a vase", "helianthus"),
    )
    assert (watercolor.concept.kind, watercolor.settings) == ("style", {"rank": "8"})
    assert (parrot.solver, parrot.settings, parrot.seed) == ("few_shot", {"steps": "10"}, 7)


def test_every_key_is_explained() -> None:
    assert tuple(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == (
        "name",
        "kind",
        "synonyms",
        "prompts",
        "anchor",
        "images",
        "solver",
        "settings",
        "seed",
    )
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == set(CONCEPT_KEYS)
    (sentence,) = re.findall(r"`defaults` may have (.*?)\.", PAGE)
    assert tuple(re.findall(r"`(\w+)`", sentence)) == DEFAULT_KEYS
