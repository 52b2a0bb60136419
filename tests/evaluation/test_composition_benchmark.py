"""The curve over N: by the suite's own code, over the listed objects, kept solver by solver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import composition
from benchmarks.cells import Budget, BudgetSpent, Costs, Shard
from benchmarks.composition import Curve, curves, draw, parts, table, told
from benchmarks.protocol import RESTORED, listed, never_listed
from benchmarks.solvers import Asked
from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.core.errors import OverpaintError
from overpaint.evaluation.context import SHARE
from overpaint.evaluation.prompts import OBJECT, EmojiPrompts
from overpaint.patches.delta import TextMap
from overpaint.patches.patch import Patch, make_patch

from .scripted import Reader, Script, faithful

ALL = Shard(0, 1)


class Fake:
    """Solves in no time, and draws by script; `stops` is the solver at whose patches the process ends."""

    device = torch.device("cpu")
    drawn = "1 step"

    def __init__(self, base: Base, stops: str = "", refuses: str = "") -> None:
        self.base, self.prompt_set, self.stops, self.refuses = base, EmojiPrompts(), stops, refuses
        self.judge = Reader(self.prompt_set)
        self.image_generator = Script(base, self.prompt_set, faithful, {})
        self.solved_for: dict[tuple[str, str], int] = {}

    def has(self, origin: object) -> bool:
        return False

    def solved(
        self, asked: Asked, concept: Concept, known: Sequence[Concept], apart: Sequence[Concept] = ()
    ) -> tuple[Patch, Costs]:
        if asked.name == self.stops:
            raise KeyboardInterrupt
        if asked.name == self.refuses:
            raise OverpaintError("no null space is left")
        self.solved_for[asked.name, concept.name] = len(known)
        rng = torch.Generator().manual_seed(len(self.solved_for))
        delta = TextMap("text_encoder", *torch.randn(2, 64, 1, generator=rng) / 8)
        patch = make_patch(self.base, concept, delta, {"name": asked.name, "settings": {}, "seed": 0})
        self.image_generator.erases[patch.id] = {
            word for word in concept.words if word in self.prompt_set.names(OBJECT)
        }
        return patch, Costs(1.0, 1.0, patch.nbytes)


def curve(fake: Any, most: int = 4, pictures: int = 18) -> Curve:
    return Curve(most, "", "", pictures, fake)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition, "COUNTS", (1, 2, 3, 4, 100))


def test_the_curve_erases_listed_objects_and_keeps_what_nobody_was_told_of(base: Base, tmp_path: Path) -> None:
    fake = Fake(base)
    assert draw(curve(fake), tmp_path, ["separable", "uce"], ALL) == {}
    found = curves(tmp_path)
    assert [*found] == ["separable", "uce"]
    for way in ("separable, plain sum", "uce, plain sum", "uce, task arithmetic", "uce, joint"):
        for n in (1, 2, 3, 4):
            rows = {r.metric: r for some in found.values() for r in some if r.subject == f"{way}, N={n}"}
            assert rows["H_c"].value == 1
            assert rows["accuracy on kept"].n == 18
    assert not [r for r in found["separable"] if "joint" in r.subject or "N=100" in r.subject]
    assert {name for solver, name in fake.solved_for if solver == "separable"} == set(listed()[:4])
    assert len(table(found)) == 4 * (1 + 4)


def test_kept_objects_are_those_that_are_never_listed(base: Base) -> None:
    fake = Fake(base)
    whole = curve(fake, most=32, pictures=2 * len(never_listed()))
    context = whole.context()
    kept = whole._kept(context, whole._concepts(context))
    assert {question.shows[OBJECT] for question in kept} == set(never_listed())
    assert len(kept) == 2 * len(never_listed())


def test_solvers_are_told_what_the_suite_tells_them() -> None:
    assert told("uce", 32) == told("esd", 32) == ()
    assert set(listed()) <= {concept.name for concept in told("separable", 32)}
    assert told("separable", 32) == told("nullspace", 32)
    assert [concept.name for concept in told("sepme", 32)] == [*listed()[: composition.TRAINED_FAR]]


def test_solvers_that_train_stop_earlier_and_keep_the_same(base: Base) -> None:
    whole = curve(Fake(base), most=32, pictures=40)
    far = {solver: replace(whole, solvers=solver) for solver in ("separable", "esd", "esd+decoupled", "uce+decoupled")}
    assert [len(each._concepts(each.context())) for each in far.values()] == [32, 16, 16, 32]
    kept = [each._kept(each.context(), each._concepts(each.context())) for each in far.values()]
    assert all(some == kept[0] for some in kept)


def test_of_separable_each_concept_is_restored_while_the_others_stay(base: Base, tmp_path: Path) -> None:
    draw(curve(Fake(base)), tmp_path, ["separable", "esd"], ALL)
    found = curves(tmp_path)
    restored = [row for row in found["separable"] if row.subject == f"separable, {RESTORED}, N=4"]
    assert {row.metric: row.value for row in restored}[SHARE] == 1
    assert not [row for row in found["esd"] if "restored" in row.subject]


def test_solvers_with_settings_and_decoupled_ones_are_drawn_under_their_whole_names(base: Base, tmp_path: Path) -> None:
    asked = [composition.TOGETHER, "uce+decoupled", f"{composition.STRICT}+decoupled"]
    assert draw(curve(Fake(base)), tmp_path, asked, ALL) == {}
    assert {*curves(tmp_path)} == {*asked}


def test_a_budget_that_is_spent_begins_nothing(base: Base, tmp_path: Path) -> None:
    spent = Budget(1.0, began=0.0)
    fake = Fake(base)
    with pytest.raises(BudgetSpent, match="goes on where this one stopped"):
        draw(replace(curve(fake), budget=spent), tmp_path, ["separable"], ALL)
    assert not fake.solved_for
    draw(replace(curve(fake), budget=Budget(3600.0)), tmp_path, ["separable"], ALL)
    assert [*curves(tmp_path)] == ["separable"]


def test_a_killed_curve_goes_on_where_it_was(base: Base, tmp_path: Path) -> None:
    draw(curve(Fake(base)), tmp_path, ["separable"], ALL)
    with pytest.raises(KeyboardInterrupt):
        draw(curve(Fake(base, stops="esd")), tmp_path, ["esd"], ALL)
    assert [*curves(tmp_path)] == ["separable"]
    again = Fake(base)
    draw(curve(again), tmp_path, ["separable", "esd"], ALL)
    assert [*curves(tmp_path)] == ["separable", "esd"]
    drawn = again.image_generator.drawn
    draw(curve(again), tmp_path, ["separable", "esd"], ALL)
    assert again.image_generator.drawn == drawn
    draw(curve(again, pictures=36), tmp_path, ["separable"], ALL)
    assert again.image_generator.drawn > drawn


def test_two_shards_draw_every_curve(base: Base, tmp_path: Path) -> None:
    for number in (0, 1):
        draw(curve(Fake(base)), tmp_path, ["separable", "uce"], Shard(number, 2))
    assert [*curves(tmp_path)] == ["separable", "uce"]


def test_what_is_drawn_apart_is_every_way_once(base: Base, tmp_path: Path) -> None:
    assert parts(["separable", "uce", "esd"]) == [("separable", False), ("uce", True), ("uce", False), ("esd", False)]
    draw(curve(Fake(base)), tmp_path, ["uce"], ALL)
    subjects = [row.subject for row in curves(tmp_path)["uce"] if row.metric == "H_c"]
    assert len(subjects) == len(set(subjects)) == 4 * 4


def test_a_solver_that_refuses_is_named_and_the_others_are_drawn(base: Base, tmp_path: Path) -> None:
    refused = draw(curve(Fake(base, refuses="sepme")), tmp_path, ["sepme", "esd"], ALL)
    assert refused == {"sepme": "no null space is left"}
    assert [*curves(tmp_path)] == ["esd"]


def test_a_curve_of_other_steps_is_drawn_again(base: Base, tmp_path: Path) -> None:
    fake = Fake(base)
    place = tmp_path / "curves" / "uce.json"
    draw(curve(fake), tmp_path, ["separable", "uce"], ALL)
    first = place.stat().st_mtime_ns
    draw(curve(fake), tmp_path, ["separable", "uce"], ALL)
    assert place.stat().st_mtime_ns == first
    fake.drawn = "2 steps"
    draw(curve(fake), tmp_path, ["separable", "uce"], ALL)
    assert place.stat().st_mtime_ns > first
