"""Two registries that know the same base under different names: one has patches and a recipe, the other nothing yet."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from overpaint.core.concepts import Concept
from overpaint.registry import Registry
from tests.registry.contents import lay
from tests.registry.patch_maker import keep, numbers, patch_file

FINGERPRINT = "c0ffee" + "0" * 58
SHARED = numbers("shared", 32, 4)
LABELS = ("one", "two", "three")


def labelled(label: str, concept: str = "apple") -> bytes:
    """A patch file with an array of its own and one that the others have too."""
    arrays = {"text_encoder/own": numbers(label, 8, 2), "text_encoder/shared": SHARED}
    return patch_file(label, arrays, concept=Concept(concept, anchor="pear"), fingerprint=FINGERPRINT)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """That files reach the disk is tested where they are written; here it would only take time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Both, made once."""
    full, empty = tmp_path_factory.mktemp("full"), tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        registry = Registry.open(full)
        registry.add_base("sd15", Path("/models/sd15"), "stable-diffusion", FINGERPRINT)
        for label, name in zip(LABELS, ("apple", "plum", "apple"), strict=True):
            registry.add_concept(Concept(name, anchor="pear"), exist_ok=True)
            keep(registry, labelled(label, name), base="sd15")
        registry.create_recipe("safe", "sd15")
        first, second, _ = (record.id for record in registry.patches())
        for patch_id, strength in ((first, 1.0), (second, 1.0), (first, 0.5), (second, None)):
            lay(registry, "safe", patch_id, strength)
        other = Registry.open(empty)
        other.add_base("mine", Path("/elsewhere"), "stable-diffusion", FINGERPRINT)
    return full, empty


@pytest.fixture
def ours(templates: tuple[Path, Path], tmp_path: Path) -> Registry:
    shutil.copytree(templates[0], tmp_path / "ours")
    return Registry.open(tmp_path / "ours", create=False)


@pytest.fixture
def theirs(templates: tuple[Path, Path], tmp_path: Path) -> Registry:
    shutil.copytree(templates[1], tmp_path / "theirs")
    return Registry.open(tmp_path / "theirs", create=False)


def holdings(registry: Registry) -> tuple[object, ...]:
    """All that must be equal after a recipe and its patches went from one registry to another."""
    return (
        {
            record.id: (
                record.blob,
                record.nbytes,
                record.concept,
                record.solver,
                record.kind,
                record.seed,
                record.solved_at,
            )
            for record in registry.patches()
        },
        [registry.blob(record) for record in sorted(registry.patches(), key=lambda each: each.id)],
        [registry.recipe(each.name).entries for each in registry.recipes()],
        [registry.log(each.name) for each in registry.recipes()],
    )


def is_empty(registry: Registry) -> bool:
    """Whether nothing was taken that anybody would see."""
    return not any((registry.patches(), registry.recipes(), registry.concepts()))
