"""Which patches explain what a checkpoint changes, whoever built it: least squares in the span of the patches' changes.

With `D` the checkpoint's difference from the base and `d_i` the change of patch i, over all tensors that either touches, the
strengths minimise `|D - sum_i s_i d_i|`. What is left, relative to `|D|`, is the residual: 0 when the patches explain all of it
up to rounding, 1 when they explain nothing. Only inner products are accumulated, so memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from overpaint.bases.base import Base
from overpaint.core.errors import OverpaintError
from overpaint.patches.compose import Term, plan
from overpaint.patches.patch import Patch, untouched_inputs

PRESENT = 0.02
"""A patch counts as present from this strength on; rounding alone gives less."""


@dataclass(frozen=True)
class Explanation:
    """Each patch with the strength that fits best, the residual (a share), and which tensors nothing explains.

    `changed` counts the tensors that differ from the base; `unexplained` are those of them that no patch reaches;
    `uncovered` the text inputs that nothing in the checkpoint changes although it changes another.
    """

    strengths: tuple[tuple[Patch, float], ...]
    residual: float
    changed: int
    unexplained: tuple[str, ...]
    uncovered: tuple[str, ...]

    @property
    def present(self) -> tuple[tuple[Patch, float], ...]:
        """The patches that are in the checkpoint, at a strength of at least `PRESENT` either way."""
        return tuple((patch, strength) for patch, strength in self.strengths if abs(strength) >= PRESENT)

    def as_json(self) -> dict[str, Any]:
        rows = [{"patch": p.id, "concept": p.concept.name, "strength": s} for p, s in self.strengths]
        return {
            "patches": rows,
            "residual": self.residual,
            "changed": self.changed,
            "unexplained": list(self.unexplained),
            "uncovered": list(self.uncovered),
        }


def explain(checkpoint: Base, base: Base, patches: Sequence[Patch]) -> Explanation:
    """Fit the patches to what a checkpoint changes. Patches of other bases are left out.

    Raises OverpaintError for a checkpoint of another architecture than the base's.
    """
    if different := sorted(set(base.names) ^ set(checkpoint.names)) or sorted(
        n for n in base.names if base.places[n].shape != checkpoint.places[n].shape
    ):
        raise OverpaintError(
            f"the checkpoint at {checkpoint.path} and the base at {base.path} are of different architectures: "
            f"{different[0]} is not in both, in one shape"
        )
    fitting = [patch for patch in patches if patch.manifest["subject"]["fingerprint"] == base.fingerprint]
    before, after = base.digests(base.names), checkpoint.digests(checkpoint.names)
    changed = [name for name in base.names if before[name] != after[name]]
    planned = [plan(base, [Term(patch.id, patch.delta)]) for patch in fitting]
    reached = {name for each in planned for name in each.stacks}
    gram = torch.zeros(len(fitting), len(fitting), dtype=torch.float64)
    shared = torch.zeros(len(fitting), dtype=torch.float64)
    total = 0.0
    for name in sorted({*changed, *reached}):
        difference = checkpoint.tensor(name).double() - base.tensor(name).double()
        total += float(difference.square().sum())
        indices = [i for i, each in enumerate(planned) if name in each.stacks]
        rows = [planned[i].change(name).flatten() for i in indices]
        if rows:
            stacked = torch.stack(rows)
            gram[torch.tensor(indices)[:, None], torch.tensor(indices)] += stacked @ stacked.T
            shared[indices] += stacked @ difference.flatten()
    strengths = torch.linalg.lstsq(gram, shared[:, None], driver="gelsd").solution[:, 0] if fitting else shared
    left = total - 2 * float(strengths @ shared) + float(strengths @ gram @ strengths)
    return Explanation(
        strengths=tuple((patch, float(strength)) for patch, strength in zip(fitting, strengths, strict=True)),
        residual=(max(0.0, left) / total) ** 0.5 if total else 0.0,
        changed=len(changed),
        unexplained=tuple(name for name in changed if name not in reached),
        uncovered=untouched_inputs(base, changed),
    )
