"""Patches of all solvers on one pipeline: every solver of the table keeps the contract, and they compose."""

from __future__ import annotations

import random
from importlib import import_module
from pathlib import Path

import pytest
import torch

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.patches.compose import Term, compose
from overpaint.patches.live import Overlay
from overpaint.solvers import SOLVERS, solver_class
from overpaint.solvers.problem import EditProblem
from overpaint.testing import SolverContract


def contract(name: str) -> type[SolverContract]:
    """The contract's class in a solver's own test module."""
    found: type[SolverContract] = import_module(f"tests.solvers.test_{name}").TestContract
    assert issubclass(found, SolverContract)
    return found


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_of_the_table_inherits_the_contract(name: str) -> None:
    assert contract(name).solver is solver_class(name)


def test_patches_of_all_solvers_are_applied_to_one_pipeline_in_any_order_and_removed(base_folder: Path) -> None:
    base, concepts = Base.open(base_folder), ("cat", "dog", "fox", "car", "bus")
    known = tuple(Concept(name) for name in concepts)
    terms = [
        Term(name, contract(name).made().solve(EditProblem(base, known[i % len(known)], known)).delta, 0.5)
        for i, name in enumerate(sorted(SOLVERS))
    ]
    composed = compose(base, terms)
    pipe, rng = base.pipeline(), random.Random(0)
    reader = base.projections()[0].partition("/")[2]
    with Overlay(pipe, base) as overlay:
        for _ in range(2):
            for term in rng.sample(terms, len(terms)):
                overlay.add(term)
            live = pipe.unet.get_parameter(reader)
            assert torch.equal(live.to(torch.float16), composed[f"unet/{reader}"])
            assert overlay.touched == sorted(composed)
            for term in rng.sample(terms, len(terms)):
                overlay.remove(term.id)
            assert torch.equal(live.to(torch.float16), base.tensor(f"unet/{reader}"))
