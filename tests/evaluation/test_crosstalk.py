"""Cross-talk: the closed form is what the weights do; other deltas are probed; the strongest pair is named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from overpaint.bases.base import Base
from overpaint.bases.text_encoder import TextEncoder
from overpaint.cli import main
from overpaint.core.concepts import Concept
from overpaint.core.errors import AlreadyExists, OverpaintError
from overpaint.evaluation.crosstalk import ConceptMoments, Crosstalk, crosstalk
from overpaint.evaluation.report_page import HeatMap, heat_map
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import Delta, Dense, LowRank, TextMap
from overpaint.patches.patch import Patch, make_patch
from overpaint.solvers.sentences import keys_and_values
from overpaint.workspace.workspace import Workspace

CAT, DOG, SUN = Concept("cat"), Concept("dog"), Concept("sun")


def text_map(width: int, seed: int = 0) -> TextMap:
    up, down = torch.randn(2, width, 2, generator=torch.Generator().manual_seed(seed)) / width
    return TextMap("text_encoder", up, down)


def patch_of(base: Base, concept: Concept, delta: Delta) -> Patch:
    return make_patch(base, concept, delta, {"name": "test", "settings": {}, "seed": 0})


def by_hand(base: Base, delta: Delta, concept: Concept) -> float:
    """The change of everything that cross-attention reads of a concept, relative to what it read."""
    keys, _ = keys_and_values(TextEncoder.of(base), base, concept)
    composed = compose(base, [Term("a", delta)])
    moved = read = 0.0
    for name in base.projections():
        weight = base.tensor(name).double()
        change = composed[name].double() - weight if name in composed else torch.zeros_like(weight)
        moved += float((change @ keys).square().sum())
        read += float((weight @ keys).square().sum())
    return math.sqrt(moved / read)


@pytest.mark.parametrize("kind", ["text map", "low rank"])
def test_the_closed_form_is_what_the_weights_do(base: Base, kind: str) -> None:
    width = 64
    delta: Delta = text_map(width)
    if kind == "low rank":
        name = base.projections()[0]
        out = base.tensor(name).shape[0]
        delta = LowRank({name: (torch.randn(out, 1), torch.randn(1, width))})
    found = crosstalk(base, [patch_of(base, CAT, delta)], [DOG, SUN])
    own = by_hand(base, delta, CAT)
    expected = [by_hand(base, delta, concept) / own for concept in (CAT, DOG, SUN)]
    assert found.methods == ("closed form",)
    assert found.concepts == ("cat", "dog", "sun")
    # The text map's change is exact here, by hand it is rounded to half precision with the weights.
    np.testing.assert_allclose(found.ratios[0], expected, rtol=2e-2)


def test_a_delta_beyond_cross_attention_is_probed(base: Base) -> None:
    name = "unet/conv_in.weight"
    patches = [
        patch_of(base, CAT, Dense({name: torch.full_like(base.tensor(name), 0.05)})),
        patch_of(base, DOG, text_map(64)),
    ]
    found = crosstalk(base, patches)
    assert found.methods == ("probed", "closed form")
    assert found.ratios[0, 0] == 1
    assert found.ratios[0, 1] > 0.3, "the first convolution moves every concept"


def test_a_patch_that_does_nothing_moves_nothing(base: Base) -> None:
    nothing = TextMap("text_encoder", torch.zeros(64, 1), torch.zeros(64, 1))
    assert not crosstalk(base, [patch_of(base, CAT, nothing)], [DOG]).ratios.any()


def test_cached_moments_give_the_same_answer(base: Base, tmp_path: Path) -> None:
    patches = [patch_of(base, CAT, text_map(64))]
    first = crosstalk(base, patches, [DOG], cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    np.testing.assert_array_equal(crosstalk(base, patches, [DOG], cache=tmp_path).ratios, first.ratios)
    for file in tmp_path.iterdir():
        file.write_bytes(b"damaged")
    np.testing.assert_array_equal(crosstalk(base, patches, [DOG], cache=tmp_path).ratios, first.ratios)


def test_a_changed_concept_is_not_taken_from_the_cache(base: Base, tmp_path: Path) -> None:
    device = torch.device("cpu")
    narrow = ConceptMoments(base, [CAT], tmp_path, device).factor(CAT)
    other = Concept("cat", synonyms=("fox",))
    wide = ConceptMoments(base, [other], tmp_path, device).factor(other)
    assert narrow.shape != wide.shape or not torch.allclose(narrow, wide)


def test_pairs_come_strongest_first_and_leave_out_a_concept_with_itself() -> None:
    ratios = np.array([[1, 0.1, 0.5], [0.3, 1, 0.0]])
    found = Crosstalk((("i", "cat"), ("j", "dog")), ("cat", "dog", "sun"), ("closed form",) * 2, ratios)
    assert [(p.emitter, p.receiver) for p in found.pairs()] == [
        ("cat", "sun"),
        ("dog", "cat"),
        ("cat", "dog"),
        ("dog", "sun"),
    ]
    assert [p.ratio for p in found.above(0.2)] == [0.5, 0.3]


def test_separable_patches_of_one_universe_do_not_disturb_each_other(tmp_path: Path, base_folder: Path) -> None:
    workspace = Workspace.open(tmp_path / "registry")
    workspace.add_base("tiny", base_folder)
    for name in ("cat", "dog", "sun"):
        workspace.add_concept(name, exist_ok=True)
    for name in ("cat", "dog", "sun"):
        workspace.create_recipe("safe", base="tiny", exist_ok=True).add(workspace.solve(name, base="tiny"))
    assert max(pair.ratio for pair in workspace.crosstalk("safe").pairs()) < 0.5


def test_the_command_prints_pairs_and_draws_a_heat_map(tmp_path: Path, base_folder: Path) -> None:
    workspace = Workspace.open(tmp_path / "registry")
    workspace.add_base("tiny", base_folder)
    for name in ("cat", "dog"):
        workspace.solve(name, base="tiny")
    out = tmp_path / "heat.png"
    result = CliRunner().invoke(
        main, ["--registry", str(tmp_path / "registry"), "crosstalk", "--json", "-o", str(out)], catch_exceptions=False
    )
    rows = json.loads(result.stdout)
    assert {(row["patch"], row["concept"]) for row in rows} == {("cat", "dog"), ("dog", "cat")}
    assert rows[0]["relative effect"] >= rows[1]["relative effect"]
    with Image.open(out) as picture:
        assert picture.width > 100


def test_a_recipe_without_patches_is_reported_as_empty(tmp_path: Path, base_folder: Path) -> None:
    workspace = Workspace.open(tmp_path / "registry")
    workspace.add_base("tiny", base_folder)
    workspace.create_recipe("safe", base="tiny", exist_ok=True)
    with pytest.raises(OverpaintError, match="no patch on the recipe 'safe'"):
        workspace.crosstalk("safe")


def test_a_figure_never_replaces_a_file(tmp_path: Path) -> None:
    out = tmp_path / "heat.png"
    out.write_text("mine")
    with pytest.raises(AlreadyExists):
        heat_map(out, HeatMap(("a",), ("b",), ((0.0,),), "", ""))
    assert out.read_text() == "mine"


def test_adding_a_patch_that_disturbs_another_names_the_pair(tmp_path: Path, base_folder: Path) -> None:
    place = tmp_path / "registry"
    workspace = Workspace.open(place)
    workspace.add_base("tiny", base_folder)
    # Alone in its universe, the first patch is under no obligation to leave the second concept be.
    blunt = workspace.solve("cat", base="tiny", settings={"weight": "1000"})
    workspace.solve("dog", base="tiny", settings={"weight": "1000"})
    run = CliRunner()
    first = run.invoke(main, ["--registry", str(place), "patch", "add", blunt.id], catch_exceptions=False)
    assert "warning" not in first.stderr
    second = run.invoke(main, ["--registry", str(place), "patch", "add", "dog"], catch_exceptions=False)
    assert "warning: the patch for cat moves dog" in second.stderr
    assert workspace.recipe("default").record.patches != ()
