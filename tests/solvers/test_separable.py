"""The separable solver keeps the contract; its theorem is in tests/solvers/test_sum_of_patches.py."""

from __future__ import annotations

from overpaint.solvers.closed_form.separable import Separable
from overpaint.testing import SolverContract


class TestContract(SolverContract):
    solver = Separable
