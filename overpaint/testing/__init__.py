"""What tests of solvers need, for this package's own and for outsiders': the contract and a tiny base. Needs pytest."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("overpaint.testing.contract")

from overpaint.testing.contract import SolverContract, tiny_base, tiny_pipeline, tiny_tokenizer  # noqa: E402

__all__ = ["SolverContract", "tiny_base", "tiny_pipeline", "tiny_tokenizer"]
