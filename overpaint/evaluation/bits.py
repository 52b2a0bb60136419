"""Whether a pipeline carries exactly the weights that it should: no tolerance, one bit is too many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from overpaint.bases.base import Base
from overpaint.patches.arrays import identical
from overpaint.patches.compose import Term, plan
from overpaint.patches.parameters import Parameters


def touched(base: Base, terms: Iterable[Term]) -> list[str]:
    """Canonical names of all tensors that any of `terms` changes, sorted."""
    return sorted({name for term in terms for name in term.delta.targets(base)})


def unequal(pipe: Any, base: Base, terms: Sequence[Term], names: Iterable[str]) -> list[str]:
    """Those of the tensors `names` in which a pipeline differs from `compose(base, terms)`, in its own dtype."""
    parameters, planned = Parameters(pipe, base), plan(base, terms)
    changed = set(planned.names)
    found = []
    for name, parameter in parameters.of(names).items():
        wanted = planned.tensor(name) if name in changed else base.tensor(name)
        carried = parameter.detach().cpu()
        if not identical(carried, wanted.to(carried.dtype)):
            found.append(name)
    return found
