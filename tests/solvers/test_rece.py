"""RECE: the adversarial embedding is the closed form's, and each round leaves less to revive."""

from __future__ import annotations

import torch

from overpaint.bases.base import Base
from overpaint.bases.text_encoder import TextEncoder
from overpaint.core.concepts import Concept
from overpaint.solvers.closed_form.edits import KeyChoice, MapEdit, gram, projection_weights, recovered, revived
from overpaint.solvers.closed_form.uce import RECE
from overpaint.solvers.problem import EditProblem
from overpaint.testing import SolverContract

CAT, DOG = Concept("cat"), Concept("dog")


class TestContract(SolverContract):
    solver = RECE


class TestContractOfThePreset(SolverContract):
    solver = RECE
    quick = RECE.PRESETS["emoji"]


def test_the_adversarial_embedding_is_the_published_one(base: Base) -> None:
    """The normal equations with the sums over layers written out."""
    rng = torch.Generator().manual_seed(0)
    encoder = TextEncoder.of(base)
    weights = projection_weights(base, "text_encoder", torch.device("cpu"))
    up, down = (0.1 * torch.randn(encoder.width, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    edit, lam = MapEdit(up, down), 0.3 * torch.eye(encoder.width, dtype=torch.float64)
    keys, _ = KeyChoice("all").keys_and_values(encoder, base, CAT)
    left, right = lam.clone(), torch.zeros_like(lam)
    for weight in weights.values():
        edited = weight + weight @ up @ down.T
        left += edited.T @ edited
        right += edited.T @ weight
    written_out = torch.linalg.inv(left) @ right @ keys
    found = revived(edit, gram(weights.values(), encoder.width), lam, keys)
    assert (found - written_out).norm() < 1e-9 * written_out.norm()


def test_every_round_leaves_less_to_revive(base: Base) -> None:
    after = [
        RECE(rounds=rounds, adversarial_ridge=0.01).solve(EditProblem(base, CAT, (DOG,))).diagnostics["recovered"]
        for rounds in (0, 1, 2, 3)
    ]
    assert after == sorted(after, reverse=True)
    assert after[3] < after[0]


def test_without_a_penalty_an_edit_that_can_be_undone_hides_nothing(base: Base) -> None:
    """Why rounds need lambda: `I + up down^T` has an inverse, so some embedding always brings the concept back."""
    encoder = TextEncoder.of(base)
    keys, _ = KeyChoice("all").keys_and_values(encoder, base, CAT)
    g = torch.eye(encoder.width, dtype=torch.float64)
    down = 0.1 * torch.linalg.qr(keys).Q[:, :2]
    assert recovered(MapEdit(down, down), g, 0.0 * g, keys) > 1 - 1e-6
