"""Every layout whose prompts are caught, on a random pipeline of diffusers' own classes: from `base add` to the built folder."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import overpaint
from overpaint import Concept
from overpaint.bases import encoder_models
from overpaint.bases.base import Base, BrokenBase
from overpaint.bases.layout import layouts
from overpaint.bases.safetensors_file import SafetensorsFile
from overpaint.bases.text_encoder import PipelineTextInput, PromptTooLong, text_sources
from overpaint.core.errors import OverpaintError
from overpaint.solvers.closed_form.uce import UCE
from overpaint.solvers.problem import EditProblem, Unsolvable
from overpaint.solvers.sentences import keys_and_values
from overpaint.solvers.trained.guidance import ESD
from tests.bases.tiny_transformers import PIPELINES, t5, tiny_transformer

CAUGHT = sorted(layout.name for layout in layouts() if layout.is_caught)
PROMPT = "a photo of a cat"
SENTENCES = {"object": [["{}", ""], ["a photo of a {}", "a photo"]], "neutral": ["{}", "a photo of the {}"]}
LENGTHS = {"cogvideox": 226, "flux2": 96, "hunyuan-video": 200, "lumina2": 160, "qwen-image": 128}
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


# A base that is not whole, or not one of ours, is named in one sentence.


@pytest.fixture
def broken(folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a FLUX folder, to be damaged."""
    shutil.copytree(folder("flux"), tmp_path / "broken")
    return tmp_path / "broken"


def in_index(base: Path, **changes: Any) -> None:
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AmusedPipeline"}, r"holds a AmusedPipeline.*FluxPipeline.*docs/adding-a-layout\.md"),
        ({"_class_name": ["pipeline", "MyPipeline"]}, "code that comes with a model is never run"),
        ({"text_encoder_2": [None, None]}, "has no text_encoder_2, which it needs"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused(broken: Path, changes: dict[str, Any], message: str) -> None:
    in_index(broken, **changes)
    with pytest.raises(OverpaintError, match=message):
        Base.open(broken)


def test_a_class_of_another_program_is_not_loaded(broken: Path) -> None:
    in_index(broken, text_encoder_2=["mine", "T5EncoderModel"])
    with pytest.raises(BrokenBase, match=r"asks for mine\.T5EncoderModel.*never run"):
        text_sources(Base.open(broken))


def test_code_beside_the_weights_is_never_run(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Kolors' text encoder was published as a program; diffusers has its classes."""
    path = shutil.copytree(folder("kolors"), tmp_path / "kolors")
    for part, settings, program in (
        ("text_encoder", "config.json", "modeling_chatglm.ChatGLMModel"),
        ("tokenizer", "tokenizer_config.json", "tokenization_chatglm.ChatGLMTokenizer"),
    ):
        file = path / part / settings
        auto_map = {"AutoModel": program, "AutoTokenizer": [program, None]}
        file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": auto_map}))
        (path / part / f"{program.partition('.')[0]}.py").write_text("raise SystemExit('this was run')")
    rows = [text_sources(Base.open(each))["context"].hidden([PROMPT])[0] for each in (path, folder("kolors"))]
    assert torch.equal(*rows)
    in_index(path, text_encoder=["modeling_chatglm", "ChatGLMModel"])
    with pytest.raises(BrokenBase, match=r"asks for modeling_chatglm\.ChatGLMModel.*never run"):
        text_sources(Base.open(path))


def test_a_package_that_a_base_needs_is_named(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.utils import dummy_torch_and_transformers_and_sentencepiece_objects as stand_ins

    base = Base.open(folder("kolors"))
    monkeypatch.setattr(diffusers, "KolorsPipeline", stand_ins.KolorsPipeline)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    for use in (base.pipeline, lambda: text_sources(base)):
        with pytest.raises(
            OverpaintError, match="KolorsPipeline needs the package sentencepiece; run `pip install sent"
        ):
            use()


def test_a_denoiser_without_its_text_input_is_refused(broken: Path) -> None:
    file = broken / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: tensor for name, tensor in weights.items() if name != "context_embedder.weight"}, file)
    with pytest.raises(BrokenBase, match=r"has no transformer/context_embedder\.weight, by which context enters it"):
        Base.open(broken)


def test_a_text_input_of_another_width_than_its_encoder_is_refused(broken: Path) -> None:
    t5(16).save_pretrained(broken / "text_encoder_2")
    encoder = text_sources(Base.open(broken))["context"]
    with pytest.raises(
        BrokenBase, match=r"context_embedder\.weight.*embeddings of width 16: they are not of one model"
    ):
        encoder.hidden([PROMPT])


def test_a_concept_beyond_the_tokens_that_are_read_is_refused(folder: Callable[[str], Path]) -> None:
    base = Base.open(folder("flux"))
    encoder = text_sources(base)["context"]
    with pytest.raises(PromptTooLong, match="ends past the 24 tokens"):
        keys_and_values(encoder, base, Concept("cat " * 24, anchor="dog"))


def test_a_training_solver_refuses_a_base_it_does_not_know(folder: Callable[[str], Path]) -> None:
    with pytest.raises(Unsolvable, match="this is a chroma base: use `separable`"):
        ESD(steps=1).solve(EditProblem(Base.open(folder("chroma")), CAT))


# Memory


def test_solving_reads_nothing_of_the_denoiser_but_its_text_inputs(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Base.open(folder("qwen-image"))
    whole = SafetensorsFile.read
    read: set[str] = set()

    def noted(self: SafetensorsFile, entries: Any, memory: Any = None) -> Any:
        if self.path.parent.name in ("transformer", "vae"):
            starts = {entry.start: name for name, entry in self.entries.items()}
            read.update(starts[entry.start] for entry in entries.values())
        return whole(self, entries, memory)

    monkeypatch.setattr(SafetensorsFile, "read", noted)
    UCE().solve(EditProblem(base, CAT))
    assert read == {"txt_norm.weight"}


@pytest.mark.parametrize("layout", CAUGHT)
@pytest.mark.parametrize("whole_layer", [encoder_models.WHOLE_LAYER, 0], ids=["by layer", "by matrix"])
def test_a_text_encoder_read_in_parts_gives_the_same_bits(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, layout: str, whole_layer: int
) -> None:
    base = Base.open(folder(layout))
    held = text_sources(base)["context"].hidden([PROMPT, ""])
    monkeypatch.setattr(encoder_models, "HELD", 0)
    monkeypatch.setattr(encoder_models, "WHOLE_LAYER", whole_layer)
    monkeypatch.setattr(encoder_models, "LARGE_MATRIX", 0)
    streamed = text_sources(base)["context"]
    assert isinstance(streamed, PipelineTextInput)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(streamed.hidden([PROMPT, ""]), held, strict=True))
        streamed.source._newest.make_room(streamed.source._newest.limit)
    for encoder in streamed._pipeline.encoders.values():
        layers = encoder_models.layers_of(encoder)
        assert all(parameter.is_meta for parameter in layers.parameters()), "a layer is there while it is used alone"
