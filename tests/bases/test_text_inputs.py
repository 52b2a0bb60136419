"""Text inputs: every way by which a prompt enters a U-Net, what comes through, and what a text map changes behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from overpaint.bases.base import Base, BrokenBase
from overpaint.bases.layout import layouts
from overpaint.bases.text_encoder import TextEncoder, encoders
from overpaint.core.concepts import Concept
from overpaint.core.errors import NotFound
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import BadDelta, TextMap, delta_from
from overpaint.patches.live import Overlay
from overpaint.patches.patch import make_patch, read_patch
from overpaint.testing.contract import tiny_pipeline
from tests.bases.tiny_xl import WIDTHS, tiny_xl, tiny_xl_base

PROMPTS = ["a photo of a cat", "", "the moon in the style of a fox", "a photo of a cat"]
POOLED = "text_encoder_2.pooled"


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_xl_base(tmp_path_factory.mktemp("xl") / "xl", torch.float32).path


@pytest.fixture
def xl(xl_folder: Path) -> Base:
    return Base.open(xl_folder)


def text_map(text_input: str, width: int, rank: int = 2, seed: int = 0) -> TextMap:
    up, down = torch.randn(2, width, rank, generator=torch.Generator().manual_seed(seed)) / width
    return TextMap(text_input, up, down)


def test_stable_diffusion_1_has_one_text_input_whose_projections_are_whole_tensors(base: Base) -> None:
    assert base.text_inputs == ("text_encoder",)
    assert base.projections() == base.projections("text_encoder")
    assert all(base.columns("text_encoder", name) == slice(0, 64) for name in base.projections())


def test_stable_diffusion_xl_has_three_text_inputs_side_by_side(xl: Base) -> None:
    assert xl.text_inputs == tuple(WIDTHS)
    assert xl.projections("text_encoder") == xl.projections("text_encoder_2")
    assert xl.projections(POOLED) == ["unet/add_embedding.linear_1.weight"]
    assert set(xl.projections()) == {*xl.projections("text_encoder"), *xl.projections(POOLED)}
    for name in xl.projections("text_encoder"):
        assert xl.columns("text_encoder", name) == slice(0, 32)
        assert xl.columns("text_encoder_2", name) == slice(32, 96)
        assert xl.places[name].shape[1] == 96
    assert xl.columns(POOLED, xl.projections(POOLED)[0]) == slice(0, 48)


def test_an_unknown_text_input_is_refused_with_the_known_ones(base: Base) -> None:
    for ask in (base.projections, base.text_input, lambda text_input: TextEncoder.of(base, text_input=text_input)):
        with pytest.raises(NotFound, match="no text input 'cellar'; known: text_encoder"):
            ask("cellar")


@pytest.mark.parametrize("layout", layouts(), ids=lambda layout: layout.name)
def test_every_layout_describes_each_text_input(layout: Any) -> None:
    for text_input in layout.text_inputs.values():
        assert layout.is_caught or layout.components[text_input.encoder].model
        assert text_input.encoder in layout.components
        assert text_input.output in (("projection",) if layout.is_caught else ("last", "penultimate", "pooled"))
        assert set(text_input.after) <= set(layout.text_inputs)
        assert not text_input.width or text_input.width.startswith(tuple(layout.components))
        assert all(layout.text_inputs[other].width for other in text_input.after), (
            "what comes first has to say how wide it is"
        )


# What comes through a text input


@torch.no_grad()
def test_the_text_inputs_of_stable_diffusion_xl_are_what_the_pipeline_hands_to_the_unet(xl: Base) -> None:
    embeds, _, pooled, _ = tiny_xl().encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    found = {text_input: encoder.hidden(PROMPTS) for text_input, encoder in encoders(xl).items()}
    # The pipeline pads a batch with the same prompt twice in it; rounding may differ by that.
    torch.testing.assert_close(torch.cat([found["text_encoder"], found["text_encoder_2"]], 2), embeds)
    torch.testing.assert_close(found[POOLED], pooled[:, None])
    for text_input, width in WIDTHS.items():
        one = TextEncoder.of(xl, text_input=text_input)
        assert one.width == width
        assert torch.equal(one.hidden(PROMPTS), found[text_input]), "alone or beside others, a text input says the same"


def test_text_inputs_of_one_model_share_it_and_compute_once(xl: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    found = encoders(xl)
    assert found["text_encoder_2"].model is found[POOLED].model
    found["text_encoder_2"].hidden(["a cat"])
    monkeypatch.setattr(found[POOLED].model, "forward", None)
    assert found[POOLED].hidden(["a cat"]).shape == (1, 1, 48)


@torch.no_grad()
def test_the_text_input_of_stable_diffusion_2_is_the_last_layer_in_its_folder(tmp_path: Path) -> None:
    """Converting SD 2.x leaves out the text encoder's last layer, so that its penultimate state is the last one."""
    whole = tiny_pipeline(seed=3)
    config = CLIPTextConfig(**{**whole.text_encoder.config.to_dict(), "num_hidden_layers": 3, "hidden_act": "gelu"})
    torch.manual_seed(3)
    three = CLIPTextModel(config).eval()
    two = CLIPTextModel(CLIPTextConfig(**{**config.to_dict(), "num_hidden_layers": 2})).eval()
    two.load_state_dict({key: three.state_dict()[key] for key in two.state_dict()})
    whole.text_encoder = two
    whole.save_pretrained(tmp_path / "sd2")
    encoder = TextEncoder.of(Base.open(tmp_path / "sd2"))
    ids = whole.tokenizer(PROMPTS, padding="max_length", max_length=16, return_tensors="pt").input_ids
    inner = getattr(three, "text_model", three)
    wanted = inner.final_layer_norm(three(ids, output_hidden_states=True).hidden_states[-2])
    torch.testing.assert_close(encoder.hidden(PROMPTS), wanted)


def test_a_pooled_embedding_has_one_row_for_a_word(xl: Base) -> None:
    assert TextEncoder.of(xl).first_position("a photo of a {}", "cat") == 5
    assert TextEncoder.of(xl, text_input=POOLED).first_position("a photo of a {}", "cat") == 0


def test_half_precision_and_variants_are_encoded_from_the_bases_own_weights(tmp_path: Path) -> None:
    tiny_pipeline().to(dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    plain = tiny_pipeline().to(dtype=torch.float16).to(dtype=torch.float32)
    ids = plain.tokenizer(PROMPTS, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = plain.text_encoder(ids).last_hidden_state
    torch.testing.assert_close(TextEncoder.of(Base.open(tmp_path / "half")).hidden(PROMPTS), wanted)


def test_a_text_encoder_with_a_tensor_missing_is_refused(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "base")
    file = tmp_path / "base/text_encoder/model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if not k.endswith("layers.1.mlp.fc1.bias")}, file)
    with pytest.raises(BrokenBase, match=r"layers\.1\.mlp\.fc1\.bias"):
        TextEncoder.of(Base.open(tmp_path / "base"))


# What a text map changes behind a text input


@pytest.mark.parametrize("text_input", WIDTHS)
def test_a_text_map_changes_the_columns_of_its_text_input_and_no_others(xl: Base, text_input: str) -> None:
    delta = text_map(text_input, WIDTHS[text_input])
    composed = compose(xl, [Term("a", delta)])
    assert sorted(composed) == delta.targets(xl) == xl.projections(text_input)
    for name, tensor in composed.items():
        columns, wanted = xl.columns(text_input, name), xl.tensor(name)
        own = wanted[:, columns].double()
        wanted[:, columns] = (own + own @ delta.up.double() @ delta.down.double().T).float()
        assert not torch.equal(tensor, xl.tensor(name))
        assert torch.equal(tensor, wanted)


def test_text_maps_of_all_text_inputs_are_applied_side_by_side(xl: Base) -> None:
    maps = {
        text_input: text_map(text_input, width, rank) for rank, (text_input, width) in enumerate(WIDTHS.items(), 10)
    }
    delta = maps["text_encoder"] + maps[POOLED] + maps["text_encoder_2"]
    together = compose(xl, [Term("a", delta)])
    one_by_one = compose(xl, [Term(text_input, text_map) for text_input, text_map in maps.items()])
    assert sorted(together) == xl.projections()
    for name, tensor in together.items():
        assert torch.equal(tensor, one_by_one[name])
        for text_input in (d for d in WIDTHS if name in xl.projections(d)):
            columns = xl.columns(text_input, name)
            assert torch.equal(tensor[:, columns], compose(xl, [Term("a", maps[text_input])])[name][:, columns])


def test_a_patch_of_several_text_inputs_comes_back_from_its_file(xl: Base) -> None:
    delta = text_map("text_encoder", 32) + text_map(POOLED, 48)
    patch = make_patch(xl, Concept("cat"), delta, {"name": "test", "settings": {}, "seed": 0})
    again = read_patch(patch.blob)
    assert again.id == patch.id
    assert again.delta == delta == delta_from("sum", delta.tensors())


def test_the_overlay_applies_to_every_text_input_and_gives_the_base_back(xl: Base) -> None:
    pipe = tiny_xl()
    before = {name: p.detach().clone() for name, p in pipe.unet.named_parameters()}
    terms = [Term(text_input, text_map(text_input, width)) for text_input, width in WIDTHS.items()]
    composed = compose(xl, terms)
    with Overlay(pipe, xl) as overlay:
        overlay.set(terms)
        live = dict(pipe.unet.named_parameters())
        assert all(torch.equal(live[name.partition("/")[2]], tensor) for name, tensor in composed.items())
    assert all(torch.equal(p, before[name]) for name, p in pipe.unet.named_parameters())


@pytest.mark.parametrize(
    ("text_input", "width", "message"),
    [
        ("text_encoder", 64, "text width 64, but unet/.*, of which text_encoder has columns 0 to 32"),
        ("text_encoder", 96, "text width 96, but unet/.* has shape .*, 96.*solved for another text encoder"),
        ("text_encoder_2", 32, "text width 32, but unet/.*, of which text_encoder_2 has columns 32 to 96"),
        (POOLED, 96, "text width 96, but unet/add_embedding.linear_1.weight has shape"),
        ("text_encoder_3", 32, "for text_encoder_3, which no projection"),
    ],
)
def test_a_text_map_that_fits_another_text_input_is_refused(
    xl: Base, text_input: str, width: int, message: str
) -> None:
    with pytest.raises(BadDelta, match=message):
        compose(xl, [Term("a", text_map(text_input, width))])


def test_a_text_map_for_one_kind_of_base_is_refused_by_the_other(base: Base, xl: Base) -> None:
    with pytest.raises(BadDelta, match="solved for another text encoder"):
        text_map("text_encoder", 64).targets(xl)
    with pytest.raises(BadDelta, match="for text_encoder_2, which no projection"):
        text_map("text_encoder_2", 64).targets(base)


def test_what_a_text_map_of_stable_diffusion_1_is_has_not_changed() -> None:
    """Frozen when a base had one text input only: patches that are out there keep their digests."""
    counting = torch.arange(128, dtype=torch.float32).reshape(64, 2) / 64
    delta = TextMap("text_encoder", counting, counting.flip(0))
    assert sorted(delta.tensors()) == ["text_encoder/down", "text_encoder/up"]
    assert delta.digest == "ce82f1ec7568152b37942d84b52eab20aa9902802fb3a89392ca87f9ee495f08"
