"""Closed-form solvers on a base whose prompt enters by several text inputs: each is edited, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.patches.compose import Term, compose
from overpaint.patches.delta import LowRank, TextMap
from overpaint.solvers.closed_form.nullspace import NullSpace
from overpaint.solvers.closed_form.uce import RECE, UCE
from overpaint.solvers.problem import EditProblem, Solver
from tests.bases.tiny_xl import tiny_xl_base

CAT, DOG = Concept("cat"), Concept("dog")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_xl_base(tmp_path_factory.mktemp("xl") / "xl").path


@pytest.mark.parametrize(
    "solver", [UCE(), UCE.preset("emoji"), RECE(), NullSpace(projections="kv"), NullSpace()], ids=repr
)
def test_every_text_input_is_edited(folder: Path, solver: Solver) -> None:
    base = Base.open(folder)
    delta = solver.solve(EditProblem(base, CAT, (DOG,))).delta
    composed = compose(base, [Term("a", delta)])
    assert set(composed) <= set(solver.touches(base))
    if isinstance(delta, LowRank):
        for name, (_, down) in delta.factors.items():
            for text_input in ("text_encoder", "text_encoder_2"):
                assert down[:, base.columns(text_input, name)].abs().max() > 0
    else:
        assert {part.encoder for part in delta.parts if isinstance(part, TextMap)} == set(base.text_inputs)
    assert all(not torch.equal(base.tensor(name), tensor) for name, tensor in composed.items())
