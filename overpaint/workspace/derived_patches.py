"""Patches that are made of another: compressed, or decoupled from other concepts.

Each is a patch of its own, whose manifest names the one it came from and what was done: the size that was asked for with the
error that was paid, or the rule and the concepts that are left alone (how: `solvers.closed_form.decoupling`).

To compress, the change of a matrix is replaced by its truncated singular value decomposition, which no other matrix of that
rank comes closer to (Eckart and Young, Psychometrika 1936); what is lost is the norm of the discarded singular values. Factors
are never multiplied out for that: with `up = Q R` and `down^T = P S`, the singular values of `up down` are those of `R S^T`. A
text map is one change of all tensors that read its text input, stacked: `[W_1; W_2; ...] U D^T`. Projected on its leading right
singular directions V it becomes `U (D^T V) V^T`, which is a text map again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.loading import own_torch_settings
from overpaint.core.errors import OverpaintError
from overpaint.core.reporting import Progress, silent
from overpaint.patches.arithmetic import above_rounding, product_svd
from overpaint.patches.compose import CompositionPlan, Term, plan
from overpaint.patches.delta import Delta, Dense, Factors, LowRank, Sum, TextMap, added, joined
from overpaint.patches.patch import Patch, make_patch
from overpaint.solvers.closed_form.decoupling import decouple
from overpaint.solvers.problem import EditProblem
from overpaint.workspace.planning import SolveContext, Truncation, decoupling_inputs


@dataclass(frozen=True, eq=False)
class Truncated:
    """A delta of fewer directions, and by tensor `|change - truncated change| / |change|` (Frobenius), 0 for no change."""

    delta: Delta
    errors: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The tensor with the largest error, and that."""
        return max(self.errors.items(), key=lambda item: (item[1], item[0]))


@own_torch_settings()
def truncate(base: Base, delta: Delta, truncation: Truncation) -> Truncated:
    """A delta with the part of every tensor's change that the truncation keeps, in float32 factors.

    What would not get smaller stays as composing adds it: vectors, and changes that have so few directions already. Residual
    bits count as part of the change and are not kept as bits: they belong to the one result that is no longer wanted. Errors
    are measured on the factors that are returned. Raises BadDelta when the delta does not fit the base.
    """
    whole = _without_bits(base, delta)
    texts = [_text_map(base, part, truncation) for part in whole.text_maps]
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    arrays: dict[str, Tensor] = {}
    for name, (pair, dense) in _gathered(base, whole).items():
        if (small := _matrix(pair, dense, truncation)) is not None:
            factors[name] = small
            continue
        if pair is not None:
            factors[name] = pair
        if dense is not None:
            arrays[name] = dense
    parts: list[Delta] = [*texts]
    parts += [LowRank(factors)] if factors else []
    parts += [Dense(arrays)] if arrays else []
    cut = parts[0] if len(parts) == 1 else Sum(tuple(parts))
    planned, after = plan(base, [Term("", whole)]), plan(base, [Term("", cut)])
    return Truncated(cut, {name: _error(planned, after, name) for name in planned.names})


def size_of(delta: Delta) -> int:
    """Bytes of a delta's arrays."""
    return sum(array.nbytes for array in delta.tensors().values())


def _without_bits(base: Base, delta: Delta) -> Delta:
    if not delta.has_bits:
        return delta
    planned = plan(base, [Term("", delta)])
    return Dense({name: planned.change(name) for name in planned.names})


def _gathered(base: Base, delta: Delta) -> dict[str, tuple[Factors | None, Tensor | None]]:
    """By tensor, all that is not a text map, as composing adds it: at most one pair of factors and one array."""
    others = [part for part in delta.parts if not isinstance(part, TextMap)]
    gathered: dict[str, tuple[Factors | None, Tensor | None]] = {}
    for name in sorted({name for part in others for name in part.targets(base)}):
        original = base.tensor(name)
        adding = [part.addend(base, name, original) for part in others if name in part.targets(base)]
        pairs = [each for each in adding if not isinstance(each, Tensor)]
        arrays = [each for each in adding if isinstance(each, Tensor)]
        pair = (joined([up for up, _ in pairs], 1), joined([down for _, down in pairs], 0)) if pairs else None
        gathered[name] = pair, reduce(added, arrays) if arrays else None
    return gathered


def _matrix(pair: Factors | None, dense: Tensor | None, truncation: Truncation) -> Factors | None:
    """Thin factors of the sum, or None where they would not be smaller than what is there."""
    if dense is not None and dense.ndim < 2:
        return None
    if dense is None:
        assert pair is not None
        left, sizes, right = product_svd(pair[0].double(), pair[1].double().T)
    else:
        total = dense.double().reshape(dense.shape[0], -1)
        if pair is not None:
            total = total + pair[0].double() @ pair[1].double()
        left, sizes, right_rows = torch.linalg.svd(total, full_matrices=False)
        right = right_rows.T
    rank = directions(sizes, truncation)
    before = sum(side.nbytes for side in pair or ()) + (dense.nbytes if dense is not None else 0)
    if rank * (len(left) + len(right)) * torch.float32.itemsize >= before:
        return None
    return (left[:, :rank] * sizes[:rank]).float(), right[:, :rank].T.float()


def _text_map(base: Base, text: TextMap, truncation: Truncation) -> TextMap:
    """The text map whose change of all projections together is the truncated one; itself where it has so few directions."""
    up, down = text.up.double(), text.down.double()
    stacked = torch.cat([text.thin_factors(base, name)[0] for name in text.targets(base)])
    _, sizes, right = product_svd(stacked, down)
    rank = directions(sizes, truncation)
    if rank >= text.up.shape[1]:
        return text
    kept = right[:, :rank]
    return TextMap(text.encoder, (up @ (down.T @ kept)).float(), kept.float())


def directions(sizes: Tensor, truncation: Truncation) -> int:
    """How many of the singular values, in descending order, are kept: at least one, and none that is rounding error."""
    present = max(1, above_rounding(sizes))
    if truncation.rank is not None:
        return min(truncation.rank, present)
    share = sizes.square().cumsum(0) / sizes.square().sum()
    assert truncation.energy is not None
    return min(int((share < truncation.energy).sum()) + 1, present)


def _error(planned: CompositionPlan, small: CompositionPlan, name: str) -> float:
    change = planned.change(name)
    norm = float(change.norm())
    return float((change - small.change(name)).norm()) / norm if norm else 0.0


class NothingSmaller(OverpaintError):
    """A patch that a compression would not make smaller."""


@dataclass(frozen=True, eq=False)
class Compressed:
    """A compressed patch, the one it came from, and the relative error of every tensor's change."""

    patch: Patch
    source: Patch
    errors: Mapping[str, float]

    @property
    def is_smaller(self) -> bool:
        """Whether the arrays take less room than they did."""
        return size_of(self.patch.delta) < size_of(self.source.delta)


def compress_patch(base: Base, patch: Patch, truncation: Truncation) -> Compressed:
    """A patch with the part of another that a truncation keeps.

    To the provenance is added what was asked, the id of the patch it came from (which need not be stored), and the largest
    relative error with its tensor. Raises WrongBase for a patch of another base.
    """
    patch.check(base)
    cut = truncate(base, patch.delta, truncation)
    tensor, error = cut.worst
    solver = patch.manifest["solver"]
    # Rounded, because the last digits of an error are the business of whoever did the sums.
    step = {**truncation.as_json(), "from": patch.id, "error": float(f"{error:.3g}"), "tensor": tensor}
    provenance = {**solver, "compressed": [*solver.get("compressed", []), step]}
    return Compressed(make_patch(base, patch.concept, cut.delta, provenance), patch, cut.errors)


def refuse_if_not_smaller(found: Compressed, truncation: Truncation) -> None:
    """Raise NothingSmaller for a compression that would only cost accuracy."""
    if not found.is_smaller:
        raise NothingSmaller(
            f"patch {found.source.id[:12]} ({found.source.concept.name}) takes {size_of(found.source.delta)} bytes, and with "
            f"{truncation} no less; nothing was stored: keep less, or leave it as it is"
        )


@dataclass(frozen=True, eq=False)
class DecoupledPatch:
    """A decoupled patch, the one it came from, and what there is to say of it (see `decouple`)."""

    patch: Patch
    source: Patch
    diagnostics: Mapping[str, Any]


def decouple_patch(
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
