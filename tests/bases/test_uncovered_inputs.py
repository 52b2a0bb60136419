"""A patch that closes some of a base's text inputs is told apart from one that closes all."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from overpaint.bases.base import Base
from overpaint.bases.text_encoder import encoders
from overpaint.core.concepts import Concept
from overpaint.evaluation.crosstalk import crosstalk
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import Delta, Dense, LowRank, TextMap
from overpaint.patches.patch import make_patch, uncovered_inputs, untouched_inputs
from overpaint.solvers.closed_form.separable import Separable
from overpaint.solvers.problem import EditProblem
from overpaint.solvers.sentences import keys_and_values
from tests.bases.tiny_xl import WIDTHS, tiny_xl_base

POOLED = "text_encoder_2.pooled"
CAT, DOG, CAR = Concept("cat"), Concept("dog"), Concept("car")
PROVENANCE = {"name": "test", "settings": {}, "seed": 0}


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return tiny_xl_base(tmp_path_factory.mktemp("xl") / "xl", torch.float32)


def closing(*text_inputs: str) -> Delta:
    maps = [TextMap(text_input, *torch.ones(2, WIDTHS[text_input], 1)) for text_input in text_inputs]
    return sum(maps[1:], start=maps[0])


def dense(base: Base, *names: str) -> Dense:
    return Dense({name: torch.full_like(base.tensor(name), 0.01) for name in names})


def test_a_patch_of_cross_attention_alone_is_reported_as_leaving_a_text_input_uncovered(xl: Base) -> None:
    assert uncovered_inputs(xl, closing("text_encoder", "text_encoder_2")) == (POOLED,)
    assert uncovered_inputs(xl, dense(xl, *xl.projections("text_encoder"))) == (POOLED,)
    assert uncovered_inputs(xl, closing("text_encoder")) == ("text_encoder_2", POOLED)
    assert uncovered_inputs(xl, closing(POOLED)) == ("text_encoder", "text_encoder_2")
    assert uncovered_inputs(xl, closing(*WIDTHS)) == ()
    assert untouched_inputs(xl, xl.projections("text_encoder")) == (POOLED,)


def test_the_columns_that_change_decide_which_of_two_text_inputs_is_covered(xl: Base) -> None:
    name = xl.projections("text_encoder")[0]
    out, inner = xl.places[name].shape
    down = torch.zeros(1, inner)
    down[:, 40] = 1
    assert uncovered_inputs(xl, LowRank({name: (torch.ones(out, 1), down)})) == ("text_encoder", POOLED)


@pytest.mark.parametrize(
    ("tensor", "left"),
    [
        ("text_encoder/text_model.encoder.layers.0.mlp.fc1.weight", ("text_encoder_2", POOLED)),
        ("text_encoder_2/text_model.encoder.layers.0.mlp.fc1.weight", ("text_encoder",)),
        ("text_encoder_2/text_projection.weight", ("text_encoder", "text_encoder_2")),
        # A penultimate state is not touched by what comes after it.
        ("text_encoder_2/text_model.encoder.layers.2.mlp.fc1.weight", ("text_encoder", "text_encoder_2")),
        ("text_encoder/text_model.encoder.layers.2.mlp.fc1.weight", ()),
        ("unet/conv_in.weight", ()),
    ],
)
def test_a_change_of_a_text_encoder_covers_its_own_text_inputs(xl: Base, tensor: str, left: tuple[str, ...]) -> None:
    assert uncovered_inputs(xl, dense(xl, tensor)) == left


def test_a_base_with_one_text_input_has_none_uncovered(base: Base) -> None:
    assert uncovered_inputs(base, TextMap("text_encoder", *torch.ones(2, 64, 1))) == ()
    assert uncovered_inputs(base, dense(base, "unet/conv_in.weight")) == ()


def test_separable_covers_every_text_input(xl: Base) -> None:
    solution = Separable().solve(EditProblem(xl, CAT, (DOG, CAR)))
    assert {part.encoder for part in solution.delta.parts if isinstance(part, TextMap)} == set(WIDTHS)
    assert solution.delta.targets(xl) == xl.projections()
    assert uncovered_inputs(xl, solution.delta) == ()
    assert solution.diagnostics["open_doors"] == []
    assert solution.diagnostics["doors"].keys() == WIDTHS.keys()


def test_each_text_input_moves_more_for_its_concept_than_for_others(xl: Base) -> None:
    solution = Separable(rank=32, ridge=1e-6).solve(EditProblem(xl, CAT, (DOG, CAR)))
    heard = encoders(xl)
    for part in solution.delta.parts:
        assert isinstance(part, TextMap)
        moved = {}
        for concept in (CAT, DOG, CAR):
            keys, _ = keys_and_values(heard[part.encoder], xl, concept)
            moved[concept.name] = float((part.up.double() @ (part.down.double().T @ keys)).norm() / keys.norm())
        assert moved["cat"] > 1.3 * max(moved["dog"], moved["car"]), part.encoder


def test_begin_of_text_does_not_move_in_any_text_input(xl: Base) -> None:
    solution = Separable().solve(EditProblem(xl, CAT, (DOG,)))
    for part in solution.delta.parts:
        assert isinstance(part, TextMap)
        if part.encoder != POOLED:
            begin = encoders(xl)[part.encoder].hidden([""])[0, 0]
            moved = part.up @ (part.down.T @ begin)
            # float32 factors, times the size of what they act on.
            assert moved.norm() < 1e-6 * part.up.norm() * part.down.norm() * begin.norm()


def test_cross_talk_of_several_text_inputs_is_what_the_weights_do(xl: Base) -> None:
    delta = closing("text_encoder", POOLED) * 1e-3
    patch = make_patch(xl, CAT, delta, PROVENANCE)
    found = crosstalk(xl, [patch], [DOG])
    own, other = (_by_hand(xl, delta, concept) for concept in (CAT, DOG))
    assert found.methods == ("closed form",)
    # The factor keeps all but a millionth of the second moment.
    assert found.ratios[0].tolist() == pytest.approx([1.0, other / own], rel=1e-3)


def _by_hand(base: Base, delta: Delta, concept: Concept) -> float:
    heard = encoders(base)
    keys = {text_input: keys_and_values(encoder, base, concept)[0] for text_input, encoder in heard.items()}
    beside = torch.cat([keys["text_encoder"], keys["text_encoder_2"]])
    composed = compose(base, [Term("a", delta)])
    moved = read = 0.0
    for name in base.projections():
        weight, said = base.tensor(name).double(), keys[POOLED] if name in base.projections(POOLED) else beside
        weight, change = weight[:, : len(said)], composed[name].double()[:, : len(said)] - weight[:, : len(said)]
        moved += float((change @ said).square().sum())
        read += float((weight @ said).square().sum())
    return math.sqrt(moved / read)


def test_separable_on_a_single_file_is_separable_on_its_folder(tmp_path: Path, base: Base) -> None:
    from tests.checkpoints import single_file

    lone = single_file(base, tmp_path / "base.safetensors")
    folder = tmp_path / "base"
    for part in ("tokenizer", "text_encoder"):
        (folder / part).mkdir(parents=True)
        for file in (base.path / part).iterdir():
            if file.suffix != ".safetensors":
                (folder / part / file.name).write_bytes(file.read_bytes())
    (folder / "model_index.json").write_bytes((base.path / "model_index.json").read_bytes())
    first, second = (Separable().solve(EditProblem(each, CAT, (DOG,))).delta for each in (lone, base))
    assert first == second
