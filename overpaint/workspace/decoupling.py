"""A decoupled patch: a patch of its own, whose manifest names the one it came from, the rule and the concepts it leaves alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from overpaint.bases.base import Base
from overpaint.core.reporting import Progress, silent
from overpaint.patches.patch import Patch, make_patch
from overpaint.solvers.closed_form.decoupling import decouple
from overpaint.solvers.problem import EditProblem
from overpaint.workspace.planning import SolveContext, decoupling_inputs


@dataclass(frozen=True, eq=False)
class DecoupledPatch:
    """A decoupled patch, the one it came from, and what there is to say of it (see `decouple`)."""

    patch: Patch
    source: Patch
    diagnostics: Mapping[str, Any]


def decoupled_patch(
    base: Base, patch: Patch, rule: str, context: SolveContext, device: torch.device, progress: Progress = silent
) -> DecoupledPatch:
    """What a patch does to its own concept and, by `rule`, to no other one of the context.

    To the provenance are added the rule, the universe, the preserved prompts, the id of the patch it came from (which need not
    be stored), and how much of its own change is left out. Raises WrongBase for a patch of another base, and what `decouple`
    raises.
    """
    patch.check(base)
    problem = EditProblem(
        base,
        patch.concept,
        context.universe,
        0,
        device,
        progress,
        context.preserve_prompts,
        context.cache,
    )
    found = decouple(problem, patch.delta, rule)
    solver = patch.manifest["solver"]
    step = {
        **decoupling_inputs(rule, context),
        "universe": [each.brief() for name, each in context.by_name.items() if name != patch.concept.name],
        "from": patch.id,
        # Rounded, because the last digits are the business of whoever did the sums.
        "residual": float(f"{found.diagnostics['residual']:.2g}"),
        "left_out": found.diagnostics["left_out"],
        **found.record,
    }
    if before := len(solver.get("compressed", [])):
        step["after"] = before
    return DecoupledPatch(
        make_patch(base, patch.concept, found.delta, {**solver, "decoupled": step}), patch, found.diagnostics
    )
