"""Import: a file of another tool becomes a delta, and what that delta does is compared with what the file says.

The file may hold changes (LoRA factors, differences) or edited weights. Weights that were rounded more coarsely than the
base is stored are compared with the base rounded alike, so that the patch holds the edit and not the rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.safetensors_file import DTYPES, dtype_name
from overpaint.core.errors import NotFound
from overpaint.core.reporting import Progress, silent
from overpaint.patches.compose import Term, plan
from overpaint.patches.delta import Delta, Dense, LowRank, Sum, Xor, identical, residual
from overpaint.patches.factors import Fitted, fitted
from overpaint.patches.formats.dialects import DIALECTS, ForeignFile, detect
from overpaint.patches.formats.reading import (
    FP8,
    FileEdits,
    Meaning,
    Pair,
    TensorEdit,
    edits_of_checkpoint,
    edits_of_file,
    open_weights,
)

LAYERS_SHOWN = 6


@dataclass(frozen=True)
class Options:
    """How to import.

    `meaning` says what plain tensors are where that cannot be decided; `allow_unmatched` leaves out keys that name nothing in
    the base; `keep_rounding` reproduces weights also where they were merely rounded more coarsely than the base;
    `tolerance` is the relative error within which thin factors are enough.
    """

    meaning: Meaning | None = None
    allow_unmatched: bool = False
    keep_rounding: bool = False
    tolerance: float = 0.0


@dataclass(frozen=True)
class Proof:
    """The imported weights against what the delta makes of the base: values that differ, and by how much at worst.

    `worst` is relative: the norm of a tensor's difference over that of the imported tensor, `where` the tensor. `dtype` is
    the one in which both were compared, `rounded` whether the base had to be rounded to it first.
    """

    differing: int
    of: int
    worst: float
    where: str
    dtype: str
    rounded: bool

    def sentence(self) -> str:
        """The proof in words."""
        end = f"; the file is in {self.dtype}, so the base was rounded alike to find the edit" if self.rounded else ""
        if not self.differing:
            return f"exact: all {self.of} values are the imported ones, bit for bit{end}"
        return (
            f"approximate: {self.differing} of {self.of} values differ (max relative error {self.worst:.1e} in {self.where})"
            + end
        )


@dataclass(frozen=True)
class Imported:
    """A delta, where it came from, how much of the file it covers, and how well it does what the file says."""

    delta: Delta
    edits: FileEdits
    changed: tuple[str, ...]
    proof: Proof

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Keys of the file that name nothing in the base."""
        return self.edits.unmatched

    def sentences(self) -> Iterator[str]:
        """What was found, for people."""
        edits, total = self.edits, self.edits.matched + len(self.unmatched)
        what = "changes to weights" if edits.meaning == "change" else "edited weights"
        yield f"{edits.dialect} ({what}, {', '.join(edits.dtypes)}): matched {edits.matched} of {total} keys"
        if self.unmatched:
            yield f"left out {len(self.unmatched)} keys, first {self.unmatched[0][:100]!r}"
        same = len(edits.names) - len(self.changed)
        yield f"changes {len(self.changed)} tensors ({_layers(self.changed)})" + (
            f", leaves {same} as they are" if same else ""
        )
        yield f"of the keys that were read, {self.proof.sentence()}" if self.unmatched else self.proof.sentence()

    def settings(self) -> dict[str, Any]:
        """What a patch's manifest says about how it was imported."""
        proof = self.proof
        return {
            "dialect": self.edits.dialect,
            "meaning": self.edits.meaning,
            "dtype": ", ".join(self.edits.dtypes),
            "unmatched": len(self.unmatched),
            "differing": proof.differing,
            "error": proof.worst,
            "compared": f"base rounded to {proof.dtype}" if proof.rounded else proof.dtype,
        }


@own_torch_settings()
def import_weights(base: Base, path: Path, options: Options | None = None, *, report: Progress = silent) -> Imported:
    """Read another tool's file or folder as a delta for a base; nothing is written.

    Raises NotFound, BrokenFile or ForeignFile when it cannot be read, is for another base, has keys that name nothing there
    (unless allowed), or changes nothing.
    """
    options, path = options or Options(), Path(path).expanduser().absolute()
    if not path.exists():
        raise NotFound(f"there is no file or folder at {path}; name the one to import")
    edits = edits_of_checkpoint(base, path, options.keep_rounding) or _edits_of_file(base, path, options)
    if edits.unmatched and not options.allow_unmatched:
        raise ForeignFile(
            f"{path.name} is read as {edits.dialect}, but {len(edits.unmatched)} of its {edits.matched + len(edits.unmatched)} "
            f"keys name nothing in the base at {base.path}, first {edits.unmatched[0][:100]!r}; nothing was imported: name the "
            "right base, or allow unmatched keys if they may be left out"
        )
    if narrow := [name for name in edits.names if DTYPES[base.places[name].entry.dtype] in FP8]:
        raise ForeignFile(
            f"the base at {base.path} has {narrow[0]} in float8, which has no room for a change; import for the base in float16 "
            "or wider"
        )
    fits: dict[str, Fitted] = {}
    for step, name in enumerate(edits.names):
        report(step, 2 * len(edits.names), name)
        edit = edits.edit(name)
        if edit is not None:
            fits[name] = _fit(edit, options.tolerance)
    if not fits:
        raise ForeignFile(f"{path.name} changes nothing: what it has is what the base at {base.path} has")
    delta = _delta(fits)
    return Imported(delta, edits, tuple(sorted(fits)), _prove(base, delta, fits, edits, report))


def _edits_of_file(base: Base, path: Path, options: Options) -> FileEdits:
    weights = open_weights(path)
    return edits_of_file(base, weights, detect(DIALECTS, base, weights.shapes), options.meaning, options.keep_rounding)


def _fit(edit: TensorEdit | Pair, tolerance: float) -> Fitted:
    if isinstance(edit, tuple):
        return Fitted(factors=edit)
    # Residual bits are those of one result in the base's own dtype: not of a change, nor of a base that was rounded.
    with_bits = edit.rounded is None and not edit.given
    return fitted(edit.original, edit.wanted, edit.change, tolerance=tolerance, with_bits=with_bits)


def _delta(fits: Mapping[str, Fitted]) -> Delta:
    """All changes as one delta."""
    factors = {name: fit.factors for name, fit in fits.items() if fit.factors is not None}
    arrays = {name: fit.array for name, fit in fits.items() if fit.array is not None}
    bits = {name: fit.bits for name, fit in fits.items() if fit.bits is not None}
    parts: list[Delta] = []
    if factors:
        parts.append(LowRank(factors))
    if arrays:
        parts.append(Dense(arrays))
    if bits:
        parts.append(Xor(bits))
    return parts[0] if len(parts) == 1 else Sum(tuple(parts))


def _prove(base: Base, delta: Delta, fits: Mapping[str, Fitted], edits: FileEdits, report: Progress) -> Proof:
    """Compose the delta on the base, read the file once more, and compare."""
    planned = plan(base, [Term("", delta)])
    differing = of = 0
    worst, where, dtypes, rounded = 0.0, "", Counter[str](), False
    for step, name in enumerate(fits):
        report(len(fits) + step, 2 * len(fits), name)
        edit = edits.edit(name)
        assert edit is not None
        if isinstance(edit, tuple):
            composed, wanted, coarser = planned.tensor(name), Fitted(factors=edit).added_to(base.tensor(name)), None
        else:
            coarser = edit.rounded
            composed = fits[name].added_to(edit.original) if coarser else planned.tensor(name)
            wanted = edit.wanted
        of += composed.numel()
        dtypes[dtype_name(coarser or composed.dtype)] += 1
        rounded = rounded or coarser is not None
        if not identical(composed, wanted):
            left = residual(composed, wanted)
            differing += len(left[0]) if left else 0
            error = _relative(composed, wanted)
            worst, where = max((worst, where), (error, name), key=itemgetter(0))
    return Proof(differing, of, worst, where, dtypes.most_common(1)[0][0], rounded)


def _relative(found: Tensor, wanted: Tensor) -> float:
    """The norm of a difference over that of what was wanted."""
    size = float(wanted.double().norm())
    apart = float((found.double() - wanted.double()).norm())
    return apart / size if size else float(apart > 0)


def _layers(names: Sequence[str]) -> str:
    """Which kinds of layers tensors belong to, the most frequent first."""
    kinds = Counter(_kind(name) for name in names)
    shown = [f"{kind} {count}" for kind, count in kinds.most_common(LAYERS_SHOWN)]
    return ", ".join([*shown, *(["and others"] if len(kinds) > LAYERS_SHOWN else [])])


def _kind(name: str) -> str:
    """A tensor's component and the last two words of its name: `unet attn2.to_k`."""
    component, _, local = name.partition("/")
    words = [word for word in local.split(".")[:-1] if not word.isdecimal()]
    return f"{component} {'.'.join(words[-2:])}"
