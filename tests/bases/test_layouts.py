"""Every layout whose prompts are caught, on a random pipeline of diffusers' own classes: from `base add` to the built folder."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import overpaint
from overpaint import Concept
from overpaint.bases.base import Base
from overpaint.bases.layout import layouts
from overpaint.bases.text_encoder import text_sources
from tests.bases.tiny_transformers import PIPELINES, tiny_transformer

CAUGHT = sorted(layout.name for layout in layouts() if layout.is_caught)
PROMPT = "a photo of a cat"
SENTENCES = {"object": [["{}", ""], ["a photo of a {}", "a photo"]], "neutral": ["{}", "a photo of the {}"]}
LENGTHS = {"cogvideox": 226, "flux2": 192, "hunyuan-video": 200, "lumina2": 160, "qwen-image": 128}
"""Tokens of a prompt; longer where a long instruction stands before it, which tiny tokenizers split into many."""
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
CAT = Concept("cat", anchor="dog")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The saved pipeline of a layout, made once."""
    root = tmp_path_factory.mktemp("bases")

    def saved(layout: str) -> Path:
        if not (root / layout).is_dir():
            tiny_transformer(layout).save_pretrained(root / layout)
            (root / layout / "overpaint.json").write_text(
                json.dumps({"prompt_length": LENGTHS.get(layout, 24), "sentences": SENTENCES})
            )
        return root / layout

    return saved


def drawn(pipe: Any, base: Base, prompt: str = PROMPT) -> Tensor:
    """Latents of a small picture, one step from the same noise."""
    pipe.set_progress_bar_config(disable=True)
    length = LENGTHS.get(base.layout.name, 24)
    has_length = "max_sequence_length" in inspect.signature(type(pipe).__call__).parameters
    found = pipe(
        prompt=prompt,
        **{**base.layout.arguments, "num_inference_steps": 2 if base.layout.name == "pixart-alpha" else 1},
        **({"max_sequence_length": length} if has_length else {}),
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        return_dict=False,
    )[0]
    return torch.as_tensor(found)


def handed_over(pipe: Any, base: Base, prompt: str) -> dict[str, Tensor]:
    """What the projections of a whole pipeline are given when it draws."""
    given: dict[str, Tensor] = {}
    handles = []
    for text_input in base.text_inputs:
        component, _, path = base.projections(text_input)[0].removesuffix(".weight").partition("/")

        def note(module: Any, args: Any, text_input: str = text_input) -> None:
            given.setdefault(text_input, args[0].detach().clone())

        handles.append(getattr(pipe, component).get_submodule(path).register_forward_pre_hook(note))
    drawn(pipe, base, prompt)
    for handle in handles:
        handle.remove()
    return {name: value[..., base.columns(name, base.projections(name)[0])] for name, value in given.items()}


def test_every_layout_has_a_random_pipeline() -> None:
    assert sorted(PIPELINES) == CAUGHT


@pytest.mark.parametrize("layout", CAUGHT)
def test_what_is_caught_is_what_the_projection_is_given(folder: Callable[[str], Path], layout: str) -> None:
    base = Base.open(folder(layout))
    wanted = handed_over(base.pipeline(), base, PROMPT)
    for name, encoder in text_sources(base).items():
        rows = wanted[name].reshape(-1, wanted[name].shape[-1])
        (found,) = encoder.hidden([PROMPT])
        assert found.shape[1] == encoder.width == rows.shape[1]
        distance = torch.cdist(found.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist").amin(1)
        assert distance.max() <= 1e-5 * rows.norm(dim=1).max(), "every row is one that the projection reads"


@pytest.mark.parametrize("layout", CAUGHT)
def test_a_patch_lives_from_adding_the_base_to_the_built_folder(
    folder: Callable[[str], Path], tmp_path: Path, layout: str
) -> None:
    settings: dict[str, Any] = {"solver": "uce"} if layout == "flux" else {"vocabulary": 6}
    workspace = overpaint.open(tmp_path / "registry")
    workspace.add_base("base", folder(layout))
    patch = workspace.solve(CAT, base="base", **settings)
    recipe = workspace.create_recipe("safe", base="base")
    recipe.add(patch)
    base = Base.open(folder(layout))
    pipe = base.pipeline()
    before = drawn(pipe, base)
    recipe.apply(pipe)
    live = drawn(pipe, base)
    assert not torch.equal(live, before)
    recipe.build(tmp_path / "built")
    built = getattr(diffusers, type(pipe).__name__).from_pretrained(tmp_path / "built")
    assert torch.equal(drawn(built, base), live)
    recipe.remove(patch)
    assert torch.equal(drawn(pipe, base), before)
