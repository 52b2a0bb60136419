"""The main job through the public facade: solve, add, remove, build."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import overpaint
from overpaint.bases.base import Base
from overpaint.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.workshop import Workshop


@pytest.fixture
def shop(tmp_path: Path, base_folder: Path) -> Workshop:
    shop = overpaint.open(tmp_path / "registry")
    shop.add_base("tiny", base_folder)
    return shop


def test_the_example_of_the_readme(shop: Workshop) -> None:
    patch = shop.solve("cat", base="tiny", solver="separable")
    assert len(patch.id) == 64
    assert patch.nbytes < 16 << 10
    recipe = shop.recipe("default")
    recipe.add(patch, strength=1.0)
    touched = shop.pipeline("default", device="cpu")
    plain = shop.base("tiny").pipeline()
    recipe.remove(patch)
    restored = shop.pipeline("default", device="cpu")
    weights = [dict(p.unet.state_dict()) for p in (touched, plain, restored)]
    assert any(not torch.equal(weights[0][k], weights[1][k]) for k in weights[1])
    assert all(torch.equal(weights[2][k], weights[1][k]) for k in weights[1])


def test_restore_is_shown_by_digests(shop: Workshop) -> None:
    recipe = shop.recipe("safe")
    for name in ("cat", "dog"):
        recipe.add(shop.solve(name, base="tiny"), why="takedown")
    recipe.remove("cat", why="licence")
    lines = recipe.log()
    assert [line.action for line in lines] == ["add", "add", "remove"]
    assert [line.why for line in lines] == ["takedown", "takedown", "licence"]
    assert lines[0].digest_before == shop.base("tiny").fingerprint
    only_dog = shop.recipe("only dog", base="tiny")
    only_dog.add("dog")
    assert only_dog.digest() == recipe.digest() == lines[-1].digest_after
    recipe.remove("dog")
    assert recipe.digest() == shop.base("tiny").fingerprint


def test_solving_the_same_twice_keeps_one_patch(shop: Workshop) -> None:
    assert shop.solve("cat", base="tiny").id == shop.solve("cat", base="tiny").id
    assert len(shop.patches()) == 1


def test_a_failed_solve_stores_nothing(shop: Workshop) -> None:
    with pytest.raises(OverpaintError):
        shop.solve("cat", base="tiny", solver="nothing")
    with pytest.raises(OverpaintError):
        shop.solve("cat", base="tiny", settings={"rank": "-1"})
    assert shop.patches() == []
    assert shop.concepts() == []


def test_a_base_that_changed_since_it_was_added_is_noticed(shop: Workshop, tmp_path: Path, base_folder: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base_folder, copy)
    shop.add_base("copy", copy)
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(blob)
    with pytest.raises(OverpaintError, match="changed since it was added"):
        overpaint.open(tmp_path / "registry").base("copy")


def test_names_are_free_text(shop: Workshop) -> None:
    recipe = shop.recipe("Montag, früh / spät'; DROP TABLE patches", base="tiny")
    recipe.add(shop.solve("kä 'x' /", base="tiny"))
    again = shop.known_recipe("Montag, früh / spät'; DROP TABLE patches")
    assert again.patches()[0][0].concept == "kä 'x' /"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f), "not a folder"),
        (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
        (lambda f: (f / "model_index.json").write_text("{"), "not a diffusers index"),
        (lambda f: (f / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"})), "FluxPipeline"),
        (lambda f: shutil.rmtree(f / "unet"), "lacks its folder"),
        (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink(), "has no diffusion_pytorch_model"),
        (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"\x10" * 64), "cut short or damaged"),
    ],
)
def test_a_broken_base_is_refused_and_nothing_is_stored(
    tmp_path: Path, base_folder: Path, spoil: Callable[[Path], object], message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base_folder, copy)
    spoil(copy)
    shop = overpaint.open(tmp_path / "registry")
    with pytest.raises(OverpaintError, match=message):
        shop.add_base("copy", copy)
    assert shop.bases() == []


def test_a_name_that_is_taken_or_unknown_is_refused(shop: Workshop, base_folder: Path) -> None:
    with pytest.raises(AlreadyExists, match="tiny"):
        shop.add_base("tiny", base_folder)
    shop.add_concept("cat")
    with pytest.raises(AlreadyExists, match="cat"):
        shop.add_concept("cat", kind="style")
    with pytest.raises(NotFound, match="tiny"):
        shop.solve("cat", base="tinny")
    with pytest.raises(NotFound):
        shop.known_recipe("nothing")


def test_a_new_recipe_needs_a_base_when_there_are_several(shop: Workshop, base_folder: Path) -> None:
    shop.add_base("second", base_folder)
    with pytest.raises(OverpaintError, match="on which base"):
        shop.recipe("new")


def test_a_build_is_the_recipe(shop: Workshop, tmp_path: Path) -> None:
    recipe = shop.recipe("safe")
    recipe.add(shop.solve("cat", base="tiny"))
    built = shop.build("safe", tmp_path / "out")
    assert Base.open(built.folder).fingerprint == recipe.digest() == built.digest
    assert "cat" in (built.folder / "README.md").read_text("utf-8")


def test_digests_are_remembered_between_openings(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(places: dict[str, object], containers: object) -> dict[str, str]:
        calls.extend(places)
        return {}

    monkeypatch.setattr("overpaint.bases.base.digests_of", counted)
    overpaint.open(tmp_path / "registry").base("tiny")
    assert calls == []


def test_a_change_by_somebody_else_in_between_is_taken_into_account(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digests in the history are those of what the recipe really held."""
    recipe = shop.recipe("safe")
    cat, dog = (shop.solve(name, base="tiny") for name in ("cat", "dog"))
    real = recipe._digest
    once: list[int] = []

    def interrupted(strengths: dict[str, float]) -> str:
        if not once:
            once.append(1)
            shop.recipe("safe").add(dog)
        return real(strengths)

    monkeypatch.setattr(recipe, "_digest", interrupted)
    line = recipe.add(cat)
    first, second = recipe.log()
    assert (first.concept, second.concept) == ("dog", "cat")
    assert line == second
    assert second.digest_before == first.digest_after
