"""The universe means the same for every text encoder: widths, lengths and vocabularies of other sizes, in float32 too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from overpaint.bases.base import Base
from overpaint.bases.text_encoder import TextEncoder, encoders
from overpaint.core.concepts import Concept
from overpaint.patches.delta import TextMap
from overpaint.patches.patch import make_patch
from overpaint.solvers.closed_form.separable import Separable, dominant_directions
from overpaint.solvers.problem import EditProblem, Unsolvable
from overpaint.solvers.sentences import KEPT_PADDING, PADDING, keys_and_values, keys_of, keys_of_prompts
from overpaint.solvers.universe import BEGIN, PreservedPrompts, Universe, universe
from overpaint.testing.contract import tiny_pipeline

CAT, DOG, CAR = Concept("cat"), Concept("dog"), Concept("car")
CPU = torch.device("cpu")
SHAPES = {"short and narrow": (32, 12, 2), "long": (64, 77, 2), "wide": (256, 24, 2), "CLIP-L": (768, 77, 12)}
"""Width, length, layers."""
FEW: dict[str, Any] = {"vocabulary": 6}
"""Enough words for what is tested, and few enough for an encoder of CLIP-L's size."""


@pytest.fixture(scope="module", params=SHAPES)
def shaped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    width, length, layers = SHAPES[request.param]
    pipe = tiny_pipeline(width=width, length=length)
    config = pipe.text_encoder.config.to_dict()
    torch.manual_seed(1)
    pipe.text_encoder = CLIPTextModel(
        CLIPTextConfig(**{**config, "num_hidden_layers": layers, "intermediate_size": width})
    )
    # As in a trained encoder, and not in an untrained one: embeddings have a mean, and begin-of-text is by far the largest.
    torch.nn.init.normal_(pipe.text_encoder.state_dict()["final_layer_norm.bias"], std=0.5)
    folder = tmp_path_factory.mktemp("shaped") / "base"
    pipe.save_pretrained(folder)
    return Base.open(folder)


def told(base: Base, concepts: tuple[Concept, ...] = (CAT, DOG), **kwargs: object) -> Universe:
    return universe(base, concepts, Separable().ridge, Separable().weight, CPU, **kwargs)  # type: ignore[arg-type]


def test_the_defaults_are_well_conditioned_and_exact_on_encoders_of_every_shape(shaped: Base) -> None:
    known = told(shaped, preserved=PreservedPrompts(words=6))
    # lambda is a thousandth of the mean eigenvalue; the largest is begin-of-text's, or at most all others together.
    assert known.condition <= 1e3 * max(BEGIN, len(known.cholesky)) + 1
    a = known.cholesky @ known.cholesky.T
    single = torch.linalg.cholesky(a.float())
    keys, values = known.keys["cat"], known.values["cat"]
    exact = torch.cholesky_solve(keys, known.cholesky)
    narrow = torch.cholesky_solve(keys.float(), single).double()
    assert (a @ exact - keys).norm() < 1e-9 * keys.norm()
    # float32 resolves one part in 10^7, and loses the condition number of it at worst.
    assert (a @ narrow - keys).norm() < 1e-3 * keys.norm()
    assert (narrow - exact).norm() < 0.1 * exact.norm()
    assert keys.shape == values.shape == (shaped.places[shaped.projections()[0]].shape[1], keys.shape[1])


def test_the_defaults_erase_and_preserve_on_encoders_of_every_shape(shaped: Base) -> None:
    solution = Separable(**FEW).solve(EditProblem(shaped, CAT, (DOG,)))
    delta, known = solution.delta, told(shaped, preserved=PreservedPrompts(words=6), to_average=True)
    assert isinstance(delta, TextMap)
    assert delta.up.dtype == torch.float32

    def moved(keys: torch.Tensor) -> float:
        return float((delta.up.double() @ (delta.down.double().T @ keys)).norm() / keys.norm())

    way = (known.values["cat"] - known.keys["cat"]).norm() / known.keys["cat"].norm()
    assert moved(known.keys["cat"]) > 0.3 * way
    assert moved(known.keys["cat"]) > 1.3 * moved(known.keys["dog"])
    assert solution.diagnostics["residual"] < 1
    encoder = TextEncoder.of(shaped)
    begin = encoder.hidden([""])[0, :1].double().T
    assert moved(begin) < 1e-5 * moved(known.keys["cat"]), "begin-of-text is where it was, to float32 rounding"


def test_a_default_patch_of_stable_diffusions_width_weighs_at_most_16_kilobytes(shaped: Base) -> None:
    solution = Separable(**FEW).solve(EditProblem(shaped, CAT, (DOG,)))
    width = shaped.places[shaped.projections()[0]].shape[1]
    patch = make_patch(shaped, CAT, solution.delta, {"name": "separable", "settings": {}, "seed": 0})
    assert patch.nbytes <= 16 * 1024 * max(1, width / 768)


def test_a_sentence_weighs_one_and_its_padding_as_much_as_a_few_tokens(base: Base) -> None:
    encoder = TextEncoder.of(base)
    hidden = encoder.hidden(["a photo of a cat"])[0].double()
    keys = keys_of(encoder, ["cat"], ["a photo of a {}"])
    weights = keys.square().sum(0) / hidden[5 : 7 + KEPT_PADDING].square().sum(1)
    # "cat", end-of-text, and the first of nine embeddings of padding.
    assert weights.shape == (2 + KEPT_PADDING,)
    assert weights.sum() == pytest.approx(1)
    assert weights[0] == pytest.approx(1 / (2 + PADDING))
    assert weights[2:].sum() == pytest.approx(PADDING / (2 + PADDING))
    assert keys_of_prompts(encoder, ["a photo of a cat"]).shape == (64, 7 + KEPT_PADDING)


@pytest.mark.parametrize("length", [1, 7, 9, 16, 100])
def test_the_first_embeddings_of_a_prompt_do_not_need_those_behind_them(base: Base, length: int) -> None:
    prompts = ["a photo of a cat", "", "a very small picture of the moon and a rose and a house and a dog"]
    for encoder in encoders(base, torch.device("cpu")).values():
        assert torch.allclose(encoder.hidden(prompts, length), encoder.hidden(prompts)[:, :length], atol=1e-5)


def test_a_concept_counts_the_same_however_many_sentences_it_is_asked_in(base: Base) -> None:
    encoder = TextEncoder.of(base)
    few = Concept("cat")
    many = Concept("cat", synonyms=("fox", "dog"), prompts=("the {} and the moon",))
    for concept in (few, many):
        keys, _ = keys_and_values(encoder, base, concept)
        # Layer normalisation makes all embeddings of a random encoder about one length.
        assert float(keys.square().sum()) == pytest.approx(64, rel=0.05)
    assert keys.shape[1] > 3 * keys_and_values(encoder, base, few)[0].shape[1]


def test_a_preserved_prompt_moves_less(base: Base) -> None:
    prompt, encoder = "the moon and a house of art", TextEncoder.of(base)
    keys = keys_of_prompts(encoder, [prompt])

    def moved(**kwargs: object) -> float:
        delta = Separable(rank=32, energy=1.0).solve(EditProblem(base, CAT, (DOG,), **kwargs)).delta  # type: ignore[arg-type]
        assert isinstance(delta, TextMap)
        return float((delta.up.double() @ (delta.down.double().T @ keys)).norm())

    assert moved(preserve_prompts=(prompt,)) < 0.7 * moved()


def test_the_order_of_prompts_to_keep_changes_nothing(base: Base) -> None:
    first = Separable().solve(EditProblem(base, CAT, preserve_prompts=("a moon", "a sun"))).delta
    assert Separable().solve(EditProblem(base, CAT, preserve_prompts=("a sun", "a moon", "a sun"))).delta == first


def test_what_was_asked_before_changes_no_bit(base: Base, base_folder: Path) -> None:
    told(base, (CAT,))
    told(base, (DOG, CAR), preserved=PreservedPrompts(("a moon",)))
    again = told(base)
    assert torch.equal(again.cholesky, told(Base.open(base_folder)).cholesky)


def test_keys_that_do_not_fit_into_memory_are_encoded_again(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = told(base)
    kept = {name: whole.keys[name] for name in whole.keys}
    monkeypatch.setattr("overpaint.solvers.universe.PAIRS_BYTES", 1)
    other = Base.open(base.path)
    fresh = told(other)
    assert torch.equal(whole.cholesky, fresh.cholesky)
    assert len(fresh.keys) == 2
    assert all(torch.equal(fresh.keys[name], kept[name]) for name in kept)


def test_a_base_is_let_go_of_with_everything_that_was_computed_for_it(base_folder: Path) -> None:
    import gc
    import weakref

    mine = Base.open(base_folder)
    told(mine)
    seen = weakref.ref(mine)
    del mine
    gc.collect()
    assert seen() is None


def test_too_small_a_ridge_and_a_concept_without_tokens_are_refused(base: Base, tmp_path: Path) -> None:
    tiny_pipeline(width=256, length=12).save_pretrained(tmp_path / "wide")
    with pytest.raises(Unsolvable, match="256 dimensions, so ridge=0 is too small"):
        Separable(ridge=0.0, vocabulary=1).solve(EditProblem(Base.open(tmp_path / "wide"), CAT))
    with pytest.raises(Unsolvable, match="weight is 0"):
        Separable(weight=0.0).solve(EditProblem(base, CAT))


def test_a_style_may_be_sent_farther_than_an_object(base: Base) -> None:
    gains = [
        Separable(style_reach=9.0).solve(EditProblem(base, Concept("cat", kind), (DOG,))).diagnostics["gain"]
        for kind in ("object", "style")
    ]
    assert 1 <= gains[0] <= Separable().reach < gains[1] <= 9


def test_the_leading_directions_are_those_of_the_whole_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(96, 96, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    matrix = left @ torch.diag(0.7 ** torch.arange(96, dtype=torch.float64)) @ right.T
    up, size, down = dominant_directions(matrix, 2)
    wanted = torch.linalg.svd(matrix)
    torch.testing.assert_close(size, wanted.S[:2])
    # The ratio of the eleventh and the second singular value, to the 24th power, is 10^-33.
    torch.testing.assert_close((up * size) @ down.T, (wanted.U[:, :2] * wanted.S[:2]) @ wanted.Vh[:2])
