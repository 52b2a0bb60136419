"""Every suite says what it should of patches that work, and catches each planted defect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.evaluation.context import ACCURACY, CHANGE, DISTANCE, ON_BASE, SHARE, WRONG, BlindJudge, EvaluatedPatch
from overpaint.evaluation.crosstalk import LOST, CrosstalkSuite
from overpaint.evaluation.metrics import Measurement
from overpaint.evaluation.prompts import OBJECT, EvalPrompt
from overpaint.evaluation.suites import SUITES, configured, suite_class
from overpaint.evaluation.suites.cost import Cost
from overpaint.evaluation.suites.erasing import Generality, Grid, Quick, Scenes, ScenesByName
from overpaint.evaluation.suites.scale import Scale
from overpaint.patches.compose import Term
from overpaint.patches.delta import TextMap
from overpaint.patches.live import Overlay
from overpaint.patches.patch import make_patch

from .scripted import CONCEPTS, Model, Script, broken, context, faithful, idle, value, wrecked


@pytest.fixture
def one_bit_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted defect: whatever an overlay writes, the last bit of one weight comes out wrong."""
    write = Overlay._write

    def wrong(self: Overlay, *args: Any) -> None:
        write(self, *args)
        name = next(iter(args[0]), None)
        if name is not None:
            assert self._parameters is not None
            bits = self._parameters.of([name])[name].data.view(torch.int32)
            bits.view(-1)[0] ^= 1
            self._detector.clear()
        self._compare = lambda *ignored: None  # type: ignore[method-assign]

    monkeypatch.setattr(Overlay, "_write", wrong)


def worst(rows: Iterable[Measurement], label: str, metric: str) -> float:
    return value(rows, f"all scenes, worst step: {label}", metric)


# Quick


def test_quick_measures_erased_preserved_and_restored(base: Base) -> None:
    rows = Quick().run(context(base, faithful))
    for concept in CONCEPTS:
        assert value(rows, f"erased: {concept.name}", ON_BASE) == 1
        assert value(rows, f"erased: {concept.name}", ACCURACY) == 0
    assert value(rows, "kept: other objects", SHARE) == 1
    assert value(rows, "kept: other styles", SHARE) == 1
    assert value(rows, "restored: concepts taken off", SHARE) == 1
    assert value(rows, "restored: weights", WRONG) == 0


def test_quick_catches_patches_that_erase_nothing(base: Base) -> None:
    rows = Quick().run(context(base, idle))
    assert value(rows, "erased: cat", ACCURACY) == 1


def test_quick_catches_patches_that_destroy_everything(base: Base) -> None:
    rows = Quick().run(context(base, wrecked))
    assert value(rows, "kept: other objects", SHARE) == 0
    assert value(rows, "restored: concepts taken off", SHARE) == 0


def test_quick_catches_a_restore_that_is_off_by_one_bit(base: Base, one_bit_off: None) -> None:
    found = context(base, faithful)
    (row,) = [row for row in Quick().run(found) if row.metric == WRONG]
    assert row.value >= 1
    assert row.n == len(base.projections())


def test_quick_on_one_patch_restores_the_base(base: Base) -> None:
    rows = Quick().run(context(base, faithful, CONCEPTS[:1]))
    assert value(rows, "restored: weights", WRONG) == 0
    assert value(rows, "restored: concepts taken off", ACCURACY) == 1


# Grid


def test_grid_finds_ua_ira_and_cra_of_each_patch_alone(base: Base) -> None:
    rows = Grid(objects=8).run(context(base, faithful))
    for subject in ("cat (separable)", "ink (separable)", "average of the patches"):
        assert [value(rows, subject, m) for m in ("UA", "IRA", "CRA", "retention in the prompt")] == [1, 1, 1, 1]
        assert value(rows, subject, "probability of the erased concept") == pytest.approx(0.01)
    assert value(rows, "base: styles", ACCURACY) == 1


def test_grid_by_hand_with_a_patch_that_hurts_its_neighbour(base: Base) -> None:
    """Erasing the cat also erases the fox: of the other objects in the grid, one is lost."""

    def greedy(erased: frozenset[str], question: Any) -> Any:
        return faithful(erased | {"fox"} if "cat" in erased else erased, question)

    suite = Grid(objects=8)
    found = context(base, greedy)
    rows = suite.run(found)
    others = len({prompt.shows[OBJECT] for prompt in suite._prompts(found)}) - 1
    assert value(rows, "cat (separable)", "IRA") == pytest.approx(1 - 1 / others)
    assert value(rows, "fox (separable)", "IRA") == 1


@pytest.mark.parametrize(("model", "expected"), [(idle, (0, 1, 1)), (wrecked, (1, 0, 0))])
def test_grid_catches_idle_and_wrecking_patches(base: Base, model: Model, expected: tuple[int, ...]) -> None:
    rows = Grid(objects=8).run(context(base, model))
    assert tuple(value(rows, "average of the patches", metric) for metric in ("UA", "IRA", "CRA")) == expected


# Generality


def test_generality_is_one_when_synonyms_go_and_others_stay(base: Base) -> None:
    rows = Generality().run(context(base, faithful))
    assert value(rows, "recipe", "H_o") == 1
    assert value(rows, "synonyms of erased objects: Acc_g", ACCURACY) == 0
    assert value(rows, "other objects the solvers never heard of", SHARE) == 1


def test_generality_catches_an_eraser_of_the_bare_name_alone(base: Base) -> None:
    def literal(erased: frozenset[str], question: Any) -> Any:
        return (
            faithful(erased, question) if "cat" in question.prompt or "kitt" not in question.prompt else question.shows
        )

    rows = Generality().run(context(base, literal))
    assert value(rows, "erased objects: Acc_e", ACCURACY) == 0
    # One of the two synonyms still works: 3 / (1/1 + 1/1 + 1/0.5).
    assert value(rows, "synonyms of erased objects: Acc_g", ACCURACY) == 0.5
    assert value(rows, "recipe", "H_o") == pytest.approx(0.75)


@pytest.mark.parametrize("model", [idle, wrecked])
def test_generality_catches_idle_and_wrecking_patches(base: Base, model: Model) -> None:
    assert value(Generality().run(context(base, model)), "recipe", "H_o") == 0


def test_generality_needs_an_object(base: Base) -> None:
    with pytest.raises(OverpaintError, match="no patch here erases one"):
        Generality().run(context(base, faithful, CONCEPTS[-1:]))


# Scenes


def test_scenes_find_nothing_wrong_with_patches_that_work(base: Base) -> None:
    rows = Scenes().run(context(base, faithful))
    assert worst(rows, "erased", ACCURACY) == 0
    assert worst(rows, "restored", SHARE) == 1
    assert worst(rows, "restored", CHANGE) == 0
    assert worst(rows, "regular", SHARE) == 1
    assert worst(rows, "weights", WRONG) == 0
    assert value(rows, "scene 1, all restored: weights", WRONG) == 0
    assert value(rows, "scene 1, t1: restored", DISTANCE) == 0
    assert value(rows, "scene 1, t1: restored", "PSNR, dB") == 100
    assert {row.subject.partition(":")[0] for row in rows} >= {"scene 3, t6", "scene 4, t5"}


def test_scenes_catch_planted_defects(base: Base) -> None:
    assert worst(Scenes().run(context(base, idle)), "erased", ACCURACY) == 1
    rows = Scenes().run(context(base, wrecked))
    assert worst(rows, "regular", SHARE) == 0
    assert worst(rows, "restored", SHARE) == 0
    assert worst(rows, "restored", CHANGE) > 0


def test_scenes_catch_a_restore_that_is_off_by_one_bit(base: Base, one_bit_off: None) -> None:
    assert worst(Scenes().run(context(base, faithful)), "weights", WRONG) >= 1


def test_scenes_ask_about_a_concept_in_sentences_that_name_no_other_erased_one(base: Base) -> None:
    eval_context = context(base, faithful)
    for key in eval_context.erased():
        others = [name for _, name in eval_context.erased() if name != key[1]]
        asked = eval_context.prompts_alone(*key, 6)
        assert len(asked) == 6
        assert not [each.prompt for each in asked if set(others) & set(each.prompt.split())]
        assert all(each.shows[key[0]] == key[1] for each in asked)


def test_every_patch_of_a_class_counts_for_what_a_sentence_names(base: Base) -> None:
    eval_context = context(base, faithful)
    first = eval_context.patches[0]
    twin = replace(first.concept, synonyms=("wordofmine",))
    patch = replace(first.patch, manifest={**first.patch.manifest, "concept": twin.as_json()})
    both = replace(eval_context, patches=(replace(first, patch=patch), *eval_context.patches))
    assert both.names_erased(EvalPrompt("a wordofmine", 0, {}))
    assert not both.names_erased(EvalPrompt("a wordofmine", 0, {}), both.class_of(first.concept))


def test_scenes_by_name_ask_by_nothing_but_names(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    eval_context = context(base, faithful)
    asked: set[tuple[str, ...]] = set()
    draw = eval_context.image_generator.draw

    def watched(terms: Sequence[Term], prompts: Sequence[EvalPrompt]) -> Any:
        asked.update((prompt.prompt, *prompt.shows.values()) for prompt in prompts)
        return draw(terms, prompts)

    monkeypatch.setattr(eval_context.image_generator, "draw", watched)
    rows = ScenesByName(pictures=4, regular=2).run(eval_context)
    assert {concept.name for concept in CONCEPTS} < {each[0] for each in asked}
    assert len(asked) == len(CONCEPTS) + 2
    assert all(len(set(each)) == 1 for each in asked)
    assert worst(rows, "erased", ACCURACY) == 0
    assert worst(rows, "restored", SHARE) == worst(rows, "regular", SHARE) == 1
    assert worst(ScenesByName().run(context(base, idle)), "erased", ACCURACY) == 1


def test_scenes_by_name_refuse_prompts_of_ones_own(base: Base) -> None:
    own = {("object", "cat"): [EvalPrompt("my cat", 0, {"object": "cat"})]}
    with pytest.raises(OverpaintError, match="asks by bare names; leave --prompts out"):
        ScenesByName().run(context(base, faithful, own_prompts=own))


def test_scenes_need_six_patches(base: Base) -> None:
    with pytest.raises(OverpaintError, match="6 patches, as in the paper; this recipe has 5"):
        Scenes().run(context(base, faithful, CONCEPTS[:5]))


# Scale


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches of the scale suite that cost nothing, and of which the script knows what they erase."""

    def solve(self: Scale, found: Any, solver: str, concept: Concept, universe: Any) -> Term:
        rng = torch.Generator().manual_seed(len(found.image_generator.erases))
        term = Term(f"{solver} {concept.words}", TextMap("text_encoder", *torch.randn(2, 64, 1, generator=rng) / 8))
        found.image_generator.erases[term.id] = set(concept.words)
        return term

    monkeypatch.setattr(Scale, "_solve", solve)


def test_scale_is_a_curve_over_composers(base: Base, solved: None) -> None:
    rows = Scale(most=8, solvers="separable,esd").run(context(base, faithful))
    for way in ("separable, plain sum", "esd, plain sum", "esd, task arithmetic", "esd, joint"):
        assert [value(rows, f"{way}, N={n}", "H_c") for n in (1, 2, 4, 8)] == [1, 1, 1, 1]
        assert value(rows, f"{way}, N=4", "order spread") == 0
    # The script does not know the merged patch, so nothing is erased by it, as by an idle one.
    assert value(rows, "esd, TIES, N=1", "H_c") == 1
    assert value(rows, "esd, TIES, N=4", "H_c") == 0


@pytest.mark.parametrize("model", [idle, wrecked])
def test_scale_catches_idle_and_wrecking_patches(base: Base, model: Model, solved: None) -> None:
    rows = Scale(most=4, solvers="separable").run(context(base, model))
    assert [value(rows, f"separable, plain sum, N={n}", "H_c") for n in (1, 2, 4)] == [0, 0, 0]


def test_scale_catches_an_order_that_matters(base: Base, solved: None, one_bit_off: None) -> None:
    rows = Scale(most=2, solvers="separable").run(context(base, faithful))
    assert value(rows, "separable, plain sum, N=2", "order spread") >= 1


def test_scale_refuses_what_it_cannot_read(base: Base) -> None:
    with pytest.raises(NotFound, match="no solver is called 'separabel'"):
        Scale(solvers="separabel").run(context(base, faithful))
    with pytest.raises(OverpaintError, match=r"written solver\.name=value; got 'rank=1'"):
        Scale(settings="rank=1")._settings("separable")


def test_scale_solves_with_the_solvers_of_this_package(base: Base) -> None:
    found = context(base, faithful, CONCEPTS[:2])
    suite = Scale(solvers="separable", settings="separable.rank=1")
    term = suite._solve(found, "separable", CONCEPTS[0], CONCEPTS[:2])
    assert isinstance(term.delta, TextMap)
    assert term.delta.up.shape[1] == 1


# Cross-talk


def test_crosstalk_finds_the_pair_that_was_planted(base: Base) -> None:
    def greedy(erased: frozenset[str], question: Any) -> Any:
        return faithful(erased | {"fox"} if "cat" in erased else erased, question)

    rows = CrosstalkSuite().run(context(base, greedy))
    assert value(rows, "cat -> fox", LOST) == 1
    assert value(rows, "fox -> cat", LOST) == 0
    assert value(rows, "all pairs", "pairs that lost accuracy") == 1


def test_crosstalk_of_idle_patches_gives_no_order(base: Base) -> None:
    rows = CrosstalkSuite().run(context(base, idle))
    assert value(rows, "all pairs", "pairs that lost accuracy") == 0
    assert not [row for row in rows if "rank correlation" in row.metric]


def test_crosstalk_catches_patches_that_destroy_everything(base: Base) -> None:
    rows = CrosstalkSuite().run(context(base, wrecked))
    pairs = [row for row in rows if row.metric == LOST]
    assert {row.value for row in pairs} == {1.0}
    assert value(rows, "all pairs", "pairs that lost accuracy") == len(pairs)


# Cost


def test_cost_counts_bytes_seconds_and_memory(base: Base) -> None:
    rows = Cost(repeats=1).run(context(base, faithful, CONCEPTS[:2]))
    assert value(rows, "cat (separable)", "bytes") == 1000
    assert value(rows, "cat (separable)", "seconds to solve") == 0.5
    assert value(rows, "all patches", "bytes") == 2000
    assert value(rows, "all patches", "seconds to compose") > 0
    assert value(rows, "separable", "peak memory of solving, MB") > 1


def test_cost_measures_what_can_be_solved_again_and_counts_what_cannot(base: Base) -> None:
    known = context(base, faithful, CONCEPTS[:2])
    imported = known.patches[0].patch
    solver = {"name": "imported", "settings": {"from": "a LoRA"}}
    other = EvaluatedPatch(make_patch(base, imported.concept, imported.delta, solver), 1.0, 0.5, 1000)
    rows = Cost(repeats=1).run(replace(known, patches=(other, known.patches[1])))
    assert value(rows, "imported", "patches that cannot be solved again here") == 1
    assert value(rows, "separable", "peak memory of solving, MB") > 1
    assert value(rows, "cat (imported)", "bytes") == 1000


# All of them


@pytest.mark.parametrize(
    "suite", [Quick(), Grid(), Generality(), Scenes(), CrosstalkSuite(), Scale(solvers="separable")]
)
def test_a_judge_that_sees_nothing_in_the_base_refuses(base: Base, suite: Any) -> None:
    found = context(base, broken)
    with pytest.raises(BlindJudge, match=r"the judge reader finds .* in only 0% of the base's own .* --judge"):
        suite.run(found)


def test_the_same_seed_gives_the_same_findings(base: Base) -> None:
    assert Quick().run(context(base, faithful)) == Quick().run(context(base, faithful))


def test_nothing_on_the_base_is_nothing_to_evaluate(base: Base) -> None:
    with pytest.raises(OverpaintError, match="no patch to evaluate"):
        context(base, faithful, ())


def test_a_concept_that_no_judge_knows_is_named(base: Base) -> None:
    with pytest.raises(NotFound, match="recognises the object 'unicorn'"):
        context(base, faithful, [Concept("unicorn")])


def test_every_listed_suite_can_be_loaded_and_configured() -> None:
    assert all(hasattr(suite_class(name), "run") for name in SUITES)
    assert configured("quick", {"erased": "3"}) == Quick(erased=3)
    assert configured("scale", {"solvers": "esd"}) == Scale(solvers="esd")


def test_suites_and_settings_that_are_not_there_are_named() -> None:
    with pytest.raises(NotFound, match="did you mean 'scenes'"):
        suite_class("scene")
    with pytest.raises(
        OverpaintError, match=r"Quick has no setting 'eras' \(did you mean 'erased'\?\); it has: erased"
    ):
        configured("quick", {"eras": "1"})
    with pytest.raises(OverpaintError, match="erased of the suite Quick is at least 1; got 0"):
        configured("quick", {"erased": "0"})


def test_progress_counts_every_picture_once(base: Base) -> None:
    told: list[tuple[int, int]] = []
    found = context(base, faithful)
    assert isinstance(found.image_generator, Script)
    found.image_generator._report = lambda done, of, text: told.append((done, of))
    found.image_generator.expect(4)
    asked = found.prompts("object", "cat", 4)
    for _ in range(2):
        found.image_generator._report_drawn("weights", asked[:2])
    found.image_generator._report_drawn("weights", asked)
    assert told == [(2, 4), (2, 4), (4, 4)]
