"""The kinds of deltas, the change that each makes to a tensor, and how each is read back from the arrays that were stored.

A text map changes every projection that reads a text input, by two factors; a low-rank delta holds two thin factors per
tensor; a dense one the change itself; residual bits make an import exact; a sum holds several of these. A new kind is a
class with `kind`, `since_format` and the methods of `Delta`, listed in `DELTAS`: nothing else names kinds one by one.

Deltas of one kind are added by putting their factors side by side, never by adding factor to factor: a product of sums is
not a sum of products. Deltas of different kinds become a `Sum`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.safetensors_file import DTYPES, FLOATS, dtype_name, tensor_digest
from overpaint.core.encoding import combined_digest
from overpaint.core.errors import OverpaintError

Factors = tuple[Tensor, Tensor]
"""`up` (out x r) and `down` (r x in) of a change `up down`."""


class BadDelta(OverpaintError):
    """A change that does not fit: a wrong shape, a value that is not finite, a tensor the base lacks."""


def checked_array(name: str, array: Tensor) -> Tensor:
    """An array as a delta holds it: on the CPU, contiguous, apart from any graph.

    Raises BadDelta when it is not floating point, or holds NaN or infinity.
    """
    if array.dtype not in FLOATS:
        raise BadDelta(f"{name} is {dtype_name(array.dtype)}; a change is float16, bfloat16, float32 or float64")
    if not all_finite(array):
        raise BadDelta(f"{name} has values that are not finite; if a solver trained it, lower its learning rate")
    return array.detach().cpu().contiguous()


def all_finite(array: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # A sum that is finite had only finite terms, and costs a tenth of looking at each; one that is not may just be large.
    return bool(torch.isfinite(array.sum())) or bool(torch.isfinite(array).all())


def scaled(array: Tensor, strength: float) -> Tensor:
    """`strength * array`, in the array's dtype where that loses no bit, else in float64.

    Composition multiplies in float64, so that a scaled factor and a strength stored beside the factor give the same bits.
    """
    wide = array.double() * strength
    narrow = wide.to(array.dtype)
    return narrow if torch.equal(narrow.double(), wide) else wide


@own_torch_settings()
def joined(arrays: Sequence[Tensor], dim: int) -> Tensor:
    """Factors side by side, in the narrowest dtype that holds all of them without loss."""
    return torch.cat(list(arrays), dim)


def identical(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; zeros of different sign differ."""
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b)))


def _bits(array: Tensor) -> Tensor:
    return array.detach().contiguous().reshape(-1).view(torch.uint8)


def paired(arrays: Mapping[str, Tensor], first: str, second: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Stored arrays `NAME/first` and `NAME/second` by name. Raises BadDelta where one has no other."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, array in arrays.items():
        name, _, side = key.rpartition("/")
        pairs.setdefault(name, {})[side] = array
    for name, pair in pairs.items():
        if pair.keys() != {first, second}:
            raise BadDelta(f"{name!r} needs two arrays, {first} and {second}; the patch has {', '.join(sorted(pair))}")
    return {name: (pair[first], pair[second]) for name, pair in pairs.items()}


class Delta(ABC):
    """An immutable map from canonical tensor name to a change. Its arrays must not be written to."""

    kind: ClassVar[str]
    since_format: ClassVar[int]
    """The first format of patches that has this kind in today's form, so that older programs read whatever they can."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The arrays to store, by storage name."""

    @classmethod
    @abstractmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor]) -> Sequence[Delta]:
        """The deltas of this kind whose `tensors` these are, more than one only in a sum. Raises BadDelta for others."""

    @abstractmethod
    def targets(self, base: Base) -> list[str]:
        """The tensors of a base this delta changes, sorted. Reads no weight.

        Raises BadDelta when the base lacks one or has it in a shape that does not fit.
        """

    @abstractmethod
    def change(self, base: Base, name: str, original: Tensor | None = None) -> Tensor:
        """What this adds to one of its targets at strength 1, before rounding: float64, of the tensor's shape.

        `original` is the base's value, read where it is needed and not given. Raises BadDelta for residual bits, which have
        no change of their own (`CompositionPlan.change`).
        """

    def thin_factors(self, base: Base, name: str, original: Tensor | None = None) -> Factors | None:
        """`up` (out x r) and `down` (r x in), float64, whose product that change is; None where it has no factors."""
        return None

    def directions(self, name: str) -> int | None:
        """r of `thin_factors`, without reading a weight; None where there are no factors."""
        return None

    def addend(self, base: Base, name: str, original: Tensor) -> Factors | Tensor:
        """What composing adds to a target: thin factors or, where it has none, the change; in any floating-point dtype."""
        return self.thin_factors(base, name, original) or self.change(base, name, original)

    def reaches(self, name: str, columns: slice) -> bool:
        """Whether the change of a target may be other than zero in these columns."""
        return True

    @abstractmethod
    def _scaled(self, strength: float) -> Delta:
        """This change times a finite strength."""

    @abstractmethod
    def _merged(self, other: Delta) -> Delta | None:
        """The sum with another delta as one of this kind, None when that cannot be."""

    @property
    def parts(self) -> tuple[Delta, ...]:
        """What this delta is a sum of: itself, unless it is a `Sum`."""
        return (self,)

    @property
    def text_maps(self) -> tuple[TextMap, ...]:
        """The parts that are text maps."""
        return tuple(part for part in self.parts if isinstance(part, TextMap))

    @property
    def has_bits(self) -> bool:
        """Whether residual bits (`Xor`) are part of it."""
        return any(isinstance(part, Xor) for part in self.parts)

    @property
    def format(self) -> int:
        """The first format of patches that can hold it."""
        return self.since_format

    @cached_property
    def digest(self) -> str:
        """sha256 over kind and arrays: equal exactly when two deltas are."""
        return combined_digest({f"{self.kind}/{name}": tensor_digest(name, t) for name, t in self.tensors().items()})

    def __add__(self, other: object) -> Delta:
        """The sum of both changes.

        Raises BadDelta for residual bits, which belong to one result, not to a change (`Xor` says why).
        """
        if not isinstance(other, Delta):
            return NotImplemented
        if self.has_bits or other.has_bits:
            raise BadDelta(
                "residual bits make one result exact and cannot be added to another change; "
                "keep the two as patches and apply both"
            )
        merged = _merge([*self.parts, *other.parts])
        return merged[0] if len(merged) == 1 else Sum(tuple(merged))

    def __mul__(self, strength: object) -> Delta:
        """The change times a strength of either sign; one factor is scaled, once, and no bit is lost (`scaled`)."""
        if isinstance(strength, bool) or not isinstance(strength, int | float):
            return NotImplemented
        if not math.isfinite(strength):
            raise BadDelta(f"a strength must be a finite number; got {strength}")
        return self if strength == 1 else self._scaled(float(strength))

    __rmul__ = __mul__

    def __neg__(self) -> Delta:
        return self * -1

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Delta) or self.kind != other.kind:
            return False
        mine, theirs = self.tensors(), other.tensors()
        return mine.keys() == theirs.keys() and all(identical(mine[name], theirs[name]) for name in mine)

    def __hash__(self) -> int:
        # Without the values: equal deltas have equal names and shapes, and hashing must not read gigabytes.
        return hash((self.kind, tuple((name, t.shape) for name, t in sorted(self.tensors().items()))))


@dataclass(frozen=True, eq=False)
class Sum(Delta):
    """A sum of deltas of different kinds, at most one of each kind (of text maps, one per encoder).

    Parts of one kind are merged and all are sorted, so that a sum is one value however it was put together. Residual bits
    come last: they refer to the rounded sum of the other parts.
    """

    summands: tuple[Delta, ...]
    kind: ClassVar[str] = "sum"
    since_format: ClassVar[int] = 2

    def __post_init__(self) -> None:
        merged = _merge([part for summand in self.summands for part in summand.parts])
        if len(merged) < 2:
            raise BadDelta(f"a sum needs deltas of at least two kinds; got {len(merged)}")
        object.__setattr__(self, "summands", tuple(merged))

    @property
    def format(self) -> int:
        return max(self.since_format, *(part.since_format for part in self.parts))

    @property
    def parts(self) -> tuple[Delta, ...]:
        return self.summands

    def tensors(self) -> dict[str, Tensor]:
        return {f"{part.kind}/{name}": array for part in self.parts for name, array in part.tensors().items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor]) -> list[Delta]:
        """One sum, from the arrays of `tensors`. Raises BadDelta for a part of a kind that is not in `DELTAS`."""
        by_kind: dict[str, dict[str, Tensor]] = {}
        for key, array in arrays.items():
            kind, _, name = key.partition("/")
            by_kind.setdefault(kind, {})[name] = array
        known = {each.kind: each for each in DELTAS}
        if unknown := sorted(by_kind.keys() - known.keys()):
            raise BadDelta(f"a sum with a part of the unknown kind {unknown[0]!r}; upgrade Overpaint")
        return [cls(tuple(part for kind, own in by_kind.items() for part in known[kind].from_arrays(own)))]

    def targets(self, base: Base) -> list[str]:
        return sorted({name for part in self.parts for name in part.targets(base)})

    def change(self, base: Base, name: str, original: Tensor | None = None) -> Tensor:
        changes = [part.change(base, name, original) for part in self.parts if name in part.targets(base)]
        return torch.stack(changes).sum(0)

    def _scaled(self, strength: float) -> Delta:
        return Sum(tuple(part * strength for part in self.parts))

    def _merged(self, other: Delta) -> Delta | None:
        return None


def _merge(parts: Iterable[Delta]) -> list[Delta]:
    """Parts with those that merge merged, sorted by kind and storage names. Raises BadDelta for a kind not in `DELTAS`."""
    distinct: list[Delta] = []
    for part in parts:
        for i, other in enumerate(distinct):
            merged = other._merged(part)
            if merged is not None:
                distinct[i] = merged
                break
        else:
            distinct.append(part)
    if unlisted := [type(part).__name__ for part in distinct if type(part) not in DELTAS]:
        raise BadDelta(f"a sum cannot hold a {unlisted[0]}, which no program could read back; list it in DELTAS")
    return sorted(distinct, key=lambda part: (DELTAS.index(type(part)), min(part.tensors())))


@dataclass(frozen=True, eq=False)
class Dense(Delta):
    """One array per tensor, of the tensor's own shape, by canonical name."""

    changes: Mapping[str, Tensor]
    kind: ClassVar[str] = "dense"
    since_format: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not self.changes:
            raise BadDelta("a dense delta without a tensor would change nothing")
        changes = {name: checked_array(name, array) for name, array in sorted(self.changes.items())}
        object.__setattr__(self, "changes", changes)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.changes)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor]) -> list[Delta]:
        return [cls(arrays)]

    def targets(self, base: Base) -> list[str]:
        for name in (names := present(base, self.changes)):
            if tuple(self.changes[name].shape) != base.places[name].shape:
                raise misfit(name, base.places[name].shape, self.changes[name].shape)
        return names

    def change(self, base: Base, name: str, original: Tensor | None = None) -> Tensor:
        return self.changes[name].double()

    def addend(self, base: Base, name: str, original: Tensor) -> Tensor:
        return self.changes[name]

    def reaches(self, name: str, columns: slice) -> bool:
        return bool(self.changes[name][:, columns].any())

    def _scaled(self, strength: float) -> Delta:
        return Dense({name: scaled(array, strength) for name, array in self.changes.items()})

    def _merged(self, other: Delta) -> Delta | None:
        if not isinstance(other, Dense):
            return None
        changes = {**self.changes, **other.changes}
        for name in self.changes.keys() & other.changes.keys():
            if self.changes[name].shape != other.changes[name].shape:
                raise misfit(name, self.changes[name].shape, other.changes[name].shape)
            changes[name] = added(self.changes[name], other.changes[name])
        return Dense(changes)


def added(a: Tensor, b: Tensor) -> Tensor:
    """The sum of two arrays, in the dtype that holds both where it holds the sum without loss, else in float64."""
    wide = a.double() + b.double()
    narrow = wide.to(torch.promote_types(a.dtype, b.dtype))
    return narrow if torch.equal(narrow.double(), wide) else wide


def present(base: Base, names: Iterable[str]) -> list[str]:
    """`names`, sorted. Raises BadDelta when the base lacks one."""
    wanted = sorted(names)
    missing = [name for name in wanted if name not in base.places]
    if missing:
        raise BadDelta(
            f"the patch names {len(missing)} of {len(wanted)} tensors that the base at {base.path} lacks, "
            f"first {missing[0]}; it was solved for another architecture"
        )
    return wanted


def misfit(name: str, wanted: Sequence[int], found: Sequence[int]) -> BadDelta:
    """The error of a change whose shape is not the tensor's."""
    return BadDelta(
        f"{name} has shape {list(wanted)}, but the change is for {list(found)}; it was made for another architecture"
    )


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """`up down` per tensor: factors out x r and r x in, by canonical name.

    A convolution's kernel (out x in x h x w) counts as the matrix out x (in h w).
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    kind: ClassVar[str] = "low-rank"
    since_format: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not self.factors:
            raise BadDelta("a low-rank delta without a tensor would change nothing")
        for name, (up, down) in self.factors.items():
            if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0] or not up.shape[1]:
                raise BadDelta(f"{name}: factors {list(up.shape)} and {list(down.shape)} do not multiply")
        factors = {
            name: (checked_array(name, up), checked_array(name, down))
            for name, (up, down) in sorted(self.factors.items())
        }
        object.__setattr__(self, "factors", factors)

    def tensors(self) -> dict[str, Tensor]:
        # One array per tensor: with two, names and digests would weigh a tenth of a patch of rank 1.
        return {f"{name}/{len(up)}": joined([up, down.T], 0) for name, (up, down) in self.factors.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor]) -> list[Delta]:
        """One delta, from the arrays of `tensors`: (out + in) x r under `NAME/OUT`, `up` and then `down` transposed.

        Format 1 of patches had two arrays, `NAME/up` and `NAME/down`, as they are.
        """
        if any(key.endswith(("/up", "/down")) for key in arrays):
            return [cls(paired(arrays, "up", "down"))]
        factors = {}
        for key, array in arrays.items():
            name, _, out = key.rpartition("/")
            if not (out.isascii() and out.isdecimal() and array.ndim == 2 and 0 < int(out) < len(array)):
                raise BadDelta(
                    f"the array {key} of shape {list(array.shape)} is no pair of factors, stacked as NAME/ROWS"
                )
            factors[name] = array[: int(out)], array[int(out) :].T
        return [cls(factors)]

    def targets(self, base: Base) -> list[str]:
        for name in (names := present(base, self.factors)):
            shape, (up, down) = base.places[name].shape, self.factors[name]
            if len(shape) < 2 or (up.shape[0], down.shape[1]) != (shape[0], math.prod(shape[1:])):
                raise misfit(name, shape, (up.shape[0], down.shape[1]))
        return names

    def change(self, base: Base, name: str, original: Tensor | None = None) -> Tensor:
        up, down = self.thin_factors(base, name)
        return (up @ down).reshape(base.places[name].shape)

    def thin_factors(self, base: Base, name: str, original: Tensor | None = None) -> Factors:
        up, down = self.factors[name]
        return up.double(), down.double()

    def addend(self, base: Base, name: str, original: Tensor) -> Factors:
        return self.factors[name]

    def directions(self, name: str) -> int:
        return self.factors[name][0].shape[1]

    def reaches(self, name: str, columns: slice) -> bool:
        return bool(self.factors[name][1][:, columns].any())

    def _scaled(self, strength: float) -> Delta:
        return LowRank({name: (scaled(up, strength), down) for name, (up, down) in self.factors.items()})

    def _merged(self, other: Delta) -> Delta | None:
        if not isinstance(other, LowRank):
            return None
        factors = {**self.factors, **other.factors}
        for name in self.factors.keys() & other.factors.keys():
            (up, down), (more_up, more_down) = self.factors[name], other.factors[name]
            if (up.shape[0], down.shape[1]) != (more_up.shape[0], more_down.shape[1]):
                raise misfit(name, (up.shape[0], down.shape[1]), (more_up.shape[0], more_down.shape[1]))
            factors[name] = joined([up, more_up], 1), joined([down, more_down], 0)
        return LowRank(factors)


_PROJECTIONS_CACHE: WeakKeyDictionary[Base, dict[tuple[str, int], list[str]]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class TextMap(Delta):
    """`W0 up down^T` for every projection W0 (out x d) that reads `encoder`; up and down are d x k.

    `encoder` names a text input (`Base.text_inputs`), for SD 1.x and 2.x the text encoder. Where a tensor reads several
    text inputs side by side, W0 stands for the columns that belong to this one; the others stay as they are.
    """

    encoder: str
    up: Tensor
    down: Tensor
    kind: ClassVar[str] = "text-map"
    since_format: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.up.shape != self.down.shape or not self.up.numel():
            raise BadDelta(
                f"a text map's factors must both be d x k; got {list(self.up.shape)}, {list(self.down.shape)}"
            )
        for side in ("up", "down"):
            object.__setattr__(self, side, checked_array(f"{self.encoder}/{side}", getattr(self, side)))

    @cached_property
    def width(self) -> int:
        """d, the width of the text input."""
        return self.up.shape[0]

    @cached_property
    def turned(self) -> tuple[Tensor, Tensor]:
        """U^T and D^T, k x d; cached views, since making them for a thousand maps takes milliseconds."""
        return self.up.T, self.down.T

    def tensors(self) -> dict[str, Tensor]:
        return {f"{self.encoder}/up": self.up, f"{self.encoder}/down": self.down}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor]) -> list[Delta]:
        """One text map for each text input, from the arrays of `tensors`."""
        return [cls(encoder, up, down) for encoder, (up, down) in sorted(paired(arrays, "up", "down").items())]

    def targets(self, base: Base) -> list[str]:
        # Matching a thousand names against patterns takes longer than applying a patch: once per opened base.
        cached = _PROJECTIONS_CACHE.setdefault(base, {})
        if (self.encoder, self.width) not in cached:
            cached[self.encoder, self.width] = _projections(base, self.encoder, self.width)
        return cached[self.encoder, self.width]

    def change(self, base: Base, name: str, original: Tensor | None = None) -> Tensor:
        up, _ = self.thin_factors(base, name, original)
        total = torch.zeros(base.places[name].shape, dtype=torch.float64)
        total[:, base.columns(self.encoder, name)] = up @ self.down.double().T
        return total

    def thin_factors(self, base: Base, name: str, original: Tensor | None = None) -> Factors:
        original = base.tensor(name) if original is None else original
        columns = base.columns(self.encoder, name)
        down = torch.zeros(self.up.shape[1], original.shape[1], dtype=torch.float64)
        down[:, columns] = self.down.double().T
        return original[:, columns].double() @ self.up.double(), down

    def directions(self, name: str) -> int:
        return self.up.shape[1]

    def _scaled(self, strength: float) -> Delta:
        return TextMap(self.encoder, scaled(self.up, strength), self.down)

    def _merged(self, other: Delta) -> Delta | None:
        if not isinstance(other, TextMap) or other.encoder != self.encoder:
            return None
        if other.width != self.width:
            raise BadDelta(f"text maps of widths {self.width} and {other.width} are for different text encoders")
        return TextMap(self.encoder, joined([self.up, other.up], 1), joined([self.down, other.down], 1))


def _projections(base: Base, text_input: str, width: int) -> list[str]:
    names = base.projections(text_input) if text_input in base.text_inputs else []
    if not names:
        raise BadDelta(f"this text map is for {text_input}, which no projection of the base at {base.path} reads")
    for name in names:
        shape, columns = base.places[name].shape, base.columns(text_input, name)
        if len(shape) != 2 or columns.stop - columns.start != width or columns.stop > shape[1]:
            raise BadDelta(
                f"this text map is for text width {width}, but {name} has shape {list(shape)}, of which {text_input} has columns "
                f"{columns.start} to {columns.stop}; it was solved for another text encoder"
            )
    return names


WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer that holds the bits of a value, by its size in bytes."""


@dataclass(frozen=True, eq=False)
class Xor(Delta):
    """Bits to flip after rounding: `(at, mask)` by canonical name.

    A change in floating point gives back an edited checkpoint only up to rounding; these bits make an import exact. `at`
    (int32 [n], ascending) are flat positions in the tensor, `mask` (int16, int32 or int64 [n], as wide as the tensor's
    values) the bits to flip there; both are sparse because most residuals are zero.

    Bits refer to one rounded result: that of the base and the other parts of the same delta, at strength 1. So they are
    flipped only where the patch alone changes a tensor, at strength 1. Otherwise the patch counts there as the difference
    that it makes when alone, which is a change like any other. Bits cannot be scaled or added as a value.
    """

    bits: Mapping[str, tuple[Tensor, Tensor]]
    kind: ClassVar[str] = "xor"
    since_format: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not self.bits:
            raise BadDelta("residual bits without a tensor would change nothing")
        checked = {name: _checked(name, at, mask) for name, (at, mask) in sorted(self.bits.items())}
        object.__setattr__(self, "bits", checked)

    def tensors(self) -> dict[str, Tensor]:
        sides = ("at", "mask")
        return {f"{name}/{side}": pair[i] for name, pair in self.bits.items() for i, side in enumerate(sides)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor]) -> list[Delta]:
        """One delta, from the arrays of `tensors`."""
        return [cls(paired(arrays, "at", "mask"))]

    def targets(self, base: Base) -> list[str]:
        for name in (names := present(base, self.bits)):
            place, (at, mask) = base.places[name], self.bits[name]
            dtype = DTYPES[place.entry.dtype]
            if WORDS.get(dtype.itemsize) != mask.dtype or int(at[-1]) >= math.prod(place.shape):
                raise BadDelta(
                    f"{name} is {dtype_name(dtype)} {list(place.shape)} in the base, but the patch has residual bits "
                    f"of {mask.element_size()} bytes up to position {int(at[-1])}; it was made from another base"
                )
        return names

    def change(self, base: Base, name: str, original: Tensor | None = None) -> Tensor:
        raise BadDelta(f"{name}: residual bits refer to a rounded result and are no change by themselves; compose them")

    def flipped(self, name: str, values: Tensor) -> Tensor:
        """`values` (contiguous, of the tensor's dtype) with the bits of `name` flipped, as a new tensor."""
        at, mask = self.bits[name]
        words = values.reshape(-1).view(mask.dtype).clone()
        words[at.long()] ^= mask
        return words.view(values.dtype).reshape(values.shape)

    def _scaled(self, strength: float) -> Delta:
        raise BadDelta(
            f"residual bits cannot be scaled by {strength:g}; apply the patch with that strength instead, where it "
            "counts as the difference it makes"
        )

    def _merged(self, other: Delta) -> Delta | None:
        if not isinstance(other, Xor):
            return None
        if twice := sorted(self.bits.keys() & other.bits.keys()):
            raise BadDelta(f"{twice[0]} would have residual bits twice; they refer to one result")
        return Xor({**self.bits, **other.bits})


def residual(values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor] | None:
    """`(at, mask)` that turn `values` into `wanted`, bit for bit; None where they are the same."""
    word = WORDS[values.element_size()]
    mask = values.contiguous().reshape(-1).view(word) ^ wanted.contiguous().reshape(-1).view(word)
    at = mask.nonzero()[:, 0]
    return (at.int(), mask[at]) if len(at) else None


def _checked(name: str, at: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if at.dtype != torch.int32 or mask.dtype not in WORDS.values():
        raise BadDelta(
            f"{name}: residual bits need int32 positions and int16, int32 or int64 masks; "
            f"got {dtype_name(at.dtype)} and {dtype_name(mask.dtype)}"
        )
    if at.ndim != 1 or at.shape != mask.shape or not len(at):
        raise BadDelta(f"{name}: residual bits need one mask per position; got {list(at.shape)}, {list(mask.shape)}")
    at, mask = at.detach().cpu().contiguous(), mask.detach().cpu().contiguous()
    if int(at[0]) < 0 or not bool((at[1:] > at[:-1]).all()) or not bool(mask.all()):
        raise BadDelta(f"{name}: residual bits need ascending positions, each once, and masks that flip something")
    return at, mask


DELTAS: tuple[type[Delta], ...] = (TextMap, LowRank, Dense, Xor)
"""The kinds that a patch can hold, alone or in a sum, in the order in which a sum holds them; bits refer to what is before."""


def known_kinds() -> dict[str, type[Delta]]:
    """The kinds of delta that this program reads, sums among them, by the names that manifests have for them."""
    every: tuple[type[Delta], ...] = (*DELTAS, Sum)
    return {each.kind: each for each in every}


def newest_format() -> int:
    """The newest format of patches that this program reads."""
    return max(each.since_format for each in known_kinds().values())


def delta_from(kind: str, tensors: Mapping[str, Tensor]) -> Delta:
    """Read back what `Delta.tensors` gave. Raises BadDelta on an unknown kind or arrays that do not belong to it."""
    kinds = known_kinds()
    if kind not in kinds:
        raise BadDelta(f"unknown kind of delta {kind!r}; this program knows {', '.join(kinds)}: upgrade Overpaint")
    parts = kinds[kind].from_arrays(tensors)
    if len(parts) != 1:
        raise BadDelta(f"a {kind} delta is one part; its arrays {sorted(tensors)[:4]} are {len(parts)}")
    return parts[0]
