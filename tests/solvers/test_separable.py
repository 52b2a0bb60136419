"""The separable solver keeps the contract; its theorem is in tests/solvers/test_sum_of_patches.py."""

from __future__ import annotations

import torch

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.patches.delta import TextMap
from overpaint.solvers.closed_form.edits import MapEdit, gram, projection_weights, revived
from overpaint.solvers.closed_form.separable import Separable
from overpaint.solvers.problem import EditProblem, settings_of
from overpaint.solvers.universe import RIDGE, universe
from overpaint.testing import SolverContract

CAT, DOG, CAR = (Concept(name) for name in ("cat", "dog", "car"))


class TestContract(SolverContract):
    solver = Separable


def test_hardening_sends_away_what_called_the_concept_up_and_leaves_others_where_they_are(base: Base) -> None:
    problem = EditProblem(base, CAT, (DOG, CAR))
    plain, hard = (Separable(harden=rounds).solve(problem) for rounds in (0, 1))
    assert isinstance(plain.delta, TextMap)
    assert isinstance(hard.delta, TextMap)
    assert hard.delta.up.shape[1] <= 2 * Separable().rank
    assert 0 < hard.diagnostics["recovered"] <= 1
    known = universe(base, (CAT, DOG, CAR), RIDGE, 1.0, torch.device("cpu"), to_average=True)
    before, after = (MapEdit(d.up.double(), d.down.double()) for d in (plain.delta, hard.delta))
    cat, values, dog = known.keys["cat"], known.values["cat"], known.keys["dog"]
    g = gram(projection_weights(base, "text_encoder", torch.device("cpu")).values(), len(cat))
    calling = revived(before, g, 0.1 * g.diagonal().mean() * torch.eye(len(g)).double(), cat)
    assert known.begin is not None
    calling = calling - torch.outer(known.begin, known.begin @ calling)
    # One round is one more least-squares fit, which goes most of the way; two thirds leaves room for other machines.
    assert (after(calling) - values).norm() < 2 / 3 * (before(calling) - values).norm()
    # A term moves of another concept at most half of what it moves of its own (the docstring of `decoupling`).
    assert (after(dog) - dog).norm() < 0.5 * (after(cat) - cat).norm()


def test_a_setting_that_came_later_changes_no_id_while_it_is_not_used() -> None:
    assert "harden" not in settings_of(Separable())
    assert settings_of(Separable(harden=2))["harden"] == 2
    assert Separable(**settings_of(Separable(harden=2))) == Separable(harden=2)


def test_a_concept_that_is_another_by_a_second_name_is_said_to_be_kept_in_part() -> None:
    base = Base.open("emoji")
    feline = Concept("feline", synonyms=("cat",))
    alone = Separable().solve(EditProblem(base, CAT, (DOG, CAR)))
    assert "note" not in alone.diagnostics
    together = Separable().solve(EditProblem(base, CAT, (DOG, CAR, feline)))
    assert "'feline'" in together.diagnostics["note"]
    assert "synonym" in together.diagnostics["note"]
