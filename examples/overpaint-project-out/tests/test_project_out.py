"""The solver keeps the contract, and does what its first line says."""

import torch
from overpaint_project_out import ProjectOut

from overpaint.bases.base import Base
from overpaint.patches.delta import TextMap
from overpaint.testing import SolverContract


class TestContract(SolverContract):
    solver = ProjectOut

    def test_nothing_is_left_of_the_direction(self, base: Base) -> None:
        delta = ProjectOut().solve(self.problem(base)).delta
        assert isinstance(delta, TextMap)
        left = delta.down + delta.up @ (delta.down.T @ delta.down)
        assert torch.allclose(left, torch.zeros_like(left), atol=1e-6)
