"""Export: patches on a base as a file that another tool loads; how much was lost on the way is measured and said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.patches.arrays import all_finite
from overpaint.patches.compose import Term, plan
from overpaint.patches.formats.changes import ROUNDING, Stored
from overpaint.patches.formats.headers import About, header_of
from overpaint.patches.formats.placing import NotExportable, Piece, place
from overpaint.patches.formats.writing import write_file
from overpaint.patches.publish import refuse_taken

Report = Callable[[int, int, str], None]
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """What was written: where, and, by tensor, the relative error that storing its change made.

    `differing` of `of` composed values come out differently when a reader adds what the file holds to the base.
    """

    path: Path
    format: str
    errors: Mapping[str, float] = field(repr=False)
    differing: int
    of: int

    @property
    def is_exact(self) -> bool:
        """Whether nothing was lost beyond the rounding of float32."""
        return max(self.errors.values()) <= ROUNDING

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    def sentence(self) -> str:
        """How exact the file is, in words."""
        where = max(self.errors, key=lambda name: self.errors[name])
        worst = f"max relative error {self.errors[where]:.1e} in {where}"
        values = f"{self.differing} of {self.of} composed weights come out differently"
        if not self.errors[where]:
            return f"exact: what is stored is the patches' own; {values}"
        return (
            f"exact but for the rounding of float32 ({worst}); {values}"
            if self.is_exact
            else f"approximate ({worst}); {values}"
        )


def export(
    base: Base,
    terms: Iterable[Term],
    out: Path,
    format: str,
    about: About,
    *,
    dtype: str = "float32",
    truncate: int | None = None,
    report: Report = lambda step, of, text: None,
) -> Exported:
    """Write patches on a base as a new file of a format (`placing.FORMATS`), whole or not at all.

    `dtype` is that of factors and differences; whole weights keep the base's. `truncate` lets changes that are not thin into
    a LoRA, cut to so many directions. Raises AlreadyExists when `out` is there, BadDelta when a patch does not fit,
    NotExportable when the format has no place for a change.
    """
    out = Path(out).absolute()
    if dtype not in STORED:
        raise NotExportable(f"values are stored as {', '.join(STORED)}; got {dtype!r}")
    if truncate is not None and truncate < 1:
        raise NotExportable(f"a change is cut to one direction or more; got {truncate}")
    if out.suffix != ".safetensors":
        raise NotExportable(f"an export is a safetensors file: let its name end in .safetensors, not {out.name}")
    refuse_taken(out)
    planned = plan(base, terms)
    if not planned.names:
        raise NotExportable("no patch changes any weight here, so there is nothing to export; add a patch first")
    pieces = place(planned, format, STORED[dtype], truncate)
    ranks = [piece.slots[0].shape[0] for piece in pieces if len(piece.slots) > 1]
    made: dict[str, Stored] = {}
    slots = [slot for piece in pieces for slot in piece.slots]
    write_file(out, header_of(base, about, format, ranks), slots, _arrays(pieces, made, report))
    return Exported(
        out,
        format,
        {name: made[name].error for name in planned.names},
        sum(stored.differing for stored in made.values()),
        sum(made[name].of for name in planned.names),
    )


def _arrays(pieces: list[Piece], made: dict[str, Stored], report: Report) -> Iterator[Tensor]:
    """Every array in turn, one tensor's at a time; what storing them cost is noted in `made`."""
    for step, piece in enumerate(pieces):
        report(step, len(pieces), piece.name)
        stored = piece.make()
        # Not every format has a place for the last one, alpha.
        for array, slot in zip(stored.arrays, piece.slots, strict=False):
            if not all_finite(array):
                raise NotExportable(
                    f"the change of {piece.name} is too large for {str(slot.dtype).removeprefix('torch.')}; store float32"
                )
            yield array.reshape(slot.shape)
        made[piece.name] = Stored((), stored.error, stored.differing, stored.of)
