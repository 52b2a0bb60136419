"""What `docs/sharing.md` specifies is what is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import pytest

import overpaint
from overpaint.cli import main
from overpaint.registry import Registry
from overpaint.registry.sharing.documents import (
    ARRAY,
    BASE,
    INDEX,
    PATCH,
    PATCH_MANIFEST,
    RECIPE,
    SIGNATURE,
    BadLayout,
    Descriptor,
    patch_document,
)
from overpaint.registry.sharing.documents import FINGERPRINT as FINGERPRINT_KEY
from overpaint.registry.sharing.ingest import PullRequest, pull
from overpaint.registry.sharing.layout import OciLayout
from overpaint.registry.sharing.selection import PATCH_LIMIT, recipe_at
from overpaint.registry.sharing.sending import push
from overpaint.registry.store import embedded_manifest, open_files

from .conftest import FINGERPRINT, is_empty, labelled

PAGE = (Path(overpaint.__file__).parent.parent / "docs" / "sharing.md").read_text("utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def shape(value: Any) -> Any:
    """The names in a JSON value, the media types, and the kinds of all other values."""
    if isinstance(value, dict):
        return {key: each if key.endswith("Type") else shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return shape(value[0])
    return type(value)


def test_the_page_shows_the_document_of_a_patch_as_it_is() -> None:
    manifest = embedded_manifest(labelled("one"))
    assert manifest is not None
    real, shown = json.loads(patch_document(manifest).data), json.loads(block("json"))
    assert shape(shown) == shape(real)
    assert shown["subject"]["size"] == real["subject"]["size"]
    assert real["config"]["digest"] == f"sha256:{manifest.id}"
    assert real["annotations"] == {FINGERPRINT_KEY: FINGERPRINT}


def test_the_page_names_every_kind_of_document_and_the_largest_patch() -> None:
    for kind in (PATCH, RECIPE, SIGNATURE, BASE, ARRAY, PATCH_MANIFEST):
        assert kind in PAGE
    assert f"at most {PATCH_LIMIT >> 30} GiB" in PAGE


@pytest.mark.parametrize("line", [line for line in block("sh").splitlines() if line])
def test_every_command_on_the_page_is_one(line: str) -> None:
    words = re.findall(r'"[^"]*"|\S+', line.partition("#")[0])[1:]
    command: click.Command = main
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    with click.Context(command) as context:
        command.parse_args(context, words)


def test_a_recipe_that_lists_more_than_its_history_is_refused(ours: Registry, theirs: Registry, tmp_path: Path) -> None:
    """Even where every digest is right: what a recipe brings is what its record says."""
    push(ours, tmp_path / "shared")
    layout = OciLayout(open_files(tmp_path / "shared"))
    (entry,) = (each for each in layout.entries() if each.artifact_type == RECIPE)
    content = json.loads(layout.document(entry))
    known = {each["digest"] for each in content["manifests"]}
    content["manifests"] += [each.as_json() for each in layout.entries() if f"sha256:{each.digest}" not in known][:1]
    data = json.dumps(content).encode()
    forged = Descriptor.of(data, INDEX, RECIPE, annotations=entry.annotations)
    layout.put(forged.digest, forged.size, [data])
    layout.update(lambda before: [*(each for each in before if each.artifact_type != RECIPE), forged])
    assert recipe_at(layout, forged).record.name == "safe"
    with pytest.raises(BadLayout, match="lists more than its record"):
        pull(theirs, tmp_path / "shared", PullRequest(recipes=["safe"]))
    assert is_empty(theirs)
