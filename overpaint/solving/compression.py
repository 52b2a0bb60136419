"""A compressed patch: a patch of its own, whose manifest names the one it came from and the error that was paid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from overpaint.bases.base import Base
from overpaint.errors import OverpaintError
from overpaint.patches.patch import Patch, make_patch
from overpaint.solving.orders import Keep
from overpaint.solving.truncation import size_of, truncated


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


def compressed(base: Base, patch: Patch, keep: Keep) -> Compressed:
    """Keep of a patch what `keep` says (see `truncation`).

    To the provenance is added what was asked, the id of the patch it came from (which need not be stored), and the largest
    relative error with its tensor. Raises WrongBase for a patch of another base.
    """
    patch.check(base)
    found = truncated(base, patch.delta, keep)
    tensor, error = found.worst
    solver = patch.manifest["solver"]
    # Rounded, because the last digits of an error are the business of whoever did the sums.
    step = {**keep.as_json(), "from": patch.id, "error": float(f"{error:.3g}"), "tensor": tensor}
    told = {**solver, "compressed": [*solver.get("compressed", []), step]}
    return Compressed(make_patch(base, patch.concept, found.delta, told), patch, found.errors)


def refuse_if_not_smaller(found: Compressed, keep: Keep) -> None:
    """Raise NothingSmaller for a compression that would only cost accuracy."""
    if not found.is_smaller:
        raise NothingSmaller(
            f"patch {found.source.id[:12]} ({found.source.concept.name}) takes {size_of(found.source.delta)} bytes, and with "
            f"{keep} no less; nothing was stored: keep less, or leave it as it is"
        )
