"""docs/adding-a-layout.md: its tables name every field there is, and its example works as it is printed."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from overpaint.bases import checkpoint, layout
from overpaint.bases.base import Base
from overpaint.bases.layout import (
    LAST,
    PENULTIMATE,
    POOLED,
    Component,
    KeyMapping,
    Layout,
    SingleFile,
    TextInput,
    UnknownLayout,
    layouts,
)
from overpaint.patches.build import build
from overpaint.patches.compose import Term
from overpaint.patches.delta import TextMap

PAGE = (Path(__file__).parents[2] / "docs/adding-a-layout.md").read_text("utf-8")
EXAMPLE, RULES = (json.loads(block) for block in re.findall(r"```json\n(.+?)```", PAGE, re.DOTALL))


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.fixture
def _with_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package as it is with the two files in their places."""
    real = layout._rules_of
    monkeypatch.setattr(layout, "_rules_of", lambda name: RULES if name == "example-text" else real(name))
    known = (*layouts(), Layout.from_json(EXAMPLE))
    for module in (checkpoint, layout):
        monkeypatch.setattr(module, "layouts", lambda: known)


def weights() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = {f"text_encoder/layers.0.{part}.weight": (4, 4) for part in "qkv"}
    shapes |= {"text_encoder/projection.weight": (3, 4), "unet/a.to_k.weight": (5, 4), "unet/a.to_v.weight": (5, 4)}
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def as_folder(folder: Path) -> Base:
    for component, stem in (("text_encoder", "model"), ("unet", "diffusion_pytorch_model")):
        (folder / component).mkdir(parents=True)
        own = {n.partition("/")[2]: t for n, t in weights().items() if n.startswith(component)}
        save_file(own, folder / component / f"{stem}.safetensors")
    (folder / "model_index.json").write_text('{"_class_name": "ExamplePipeline"}')
    return Base.open(folder)


def as_file(file: Path) -> Base:
    own = weights()
    stack = torch.cat([own[f"text_encoder/layers.0.{part}.weight"] for part in "qkv"])
    save_file(
        {
            "text.layer1.qkv": stack,
            "text.out": own["text_encoder/projection.weight"].T.contiguous(),
            "text.head.bias": torch.zeros(2),
            "net.a.to_k.weight": own["unet/a.to_k.weight"],
            "net.a.to_v.weight": own["unet/a.to_v.weight"],
            "average.a.to_k.weight": own["unet/a.to_k.weight"] * 1.01,
        },
        file,
    )
    return Base.open(file)


@pytest.mark.usefixtures("_with_the_example")
def test_the_example_is_one_base_in_both_containers(tmp_path: Path) -> None:
    folder, file = as_folder(tmp_path / "example"), as_file(tmp_path / "example.safetensors")
    assert folder.layout.name == file.layout.name == "example"
    assert folder.fingerprint == file.fingerprint
    assert folder.names == sorted(weights())
    for name, tensor in weights().items():
        assert torch.equal(file.tensor(name), tensor)
    assert folder.text_inputs == ("text_encoder",)
    assert folder.projections() == ["unet/a.to_k.weight", "unet/a.to_v.weight"]
    assert file.unnamed == {file.path: ["average.a.to_k.weight", "text.head.bias"]}


@pytest.mark.usefixtures("_with_the_example")
def test_a_patch_on_the_example_leaves_its_moving_averages_out(tmp_path: Path) -> None:
    file = as_file(tmp_path / "example.safetensors")
    term = Term("a", TextMap("text_encoder", torch.ones(4, 1), torch.ones(4, 1)))
    built = build(file, [term], tmp_path / "safe.safetensors")
    assert built.left_out == ("average.a.to_k.weight",)


def test_without_its_layout_the_example_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(UnknownLayout, match=r"holds a ExamplePipeline.*docs/adding-a-layout\.md"):
        as_folder(tmp_path / "example")


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("The layout", Layout),
        ("The layout", Component),
        ("The layout", TextInput),
        ("Single files", SingleFile),
        ("Single files", KeyMapping),
    ],
)
def test_every_field_is_on_the_page(title: str, kind: Any) -> None:
    named = set(re.findall(r"`(\w+)`", section(title)))
    wanted = {field.name for field in fields(kind)} - {"mappings"}  # written as `components`
    assert wanted <= named


def test_the_page_names_no_field_that_is_not_there() -> None:
    first_cells = re.findall(r"^\| (`.+?) \|", section("The layout") + section("Single files"), re.MULTILINE)
    named = {word for cell in first_cells for word in re.findall(r"`(\w+)`", cell)}
    known = {field.name for kind in (Layout, Component, TextInput, KeyMapping) for field in fields(kind)}
    assert named <= known | {"about"}


def test_the_page_lists_the_layouts_and_the_outputs_of_text_inputs() -> None:
    ships = re.search(r"Layouts that ship: (.+)", PAGE)
    assert ships is not None
    assert set(re.findall(r"`([\w-]+)`", ships[1])) == {known.name for known in layouts()}
    assert {LAST, PENULTIMATE, POOLED} <= set(re.findall(r"`(\w+)`", section("The layout")))
