"""Composition: the tensors that a base and a set of patches yield.

A function of the set: terms are sorted by patch id, summed in higher precision and rounded once to the tensor's own dtype
(`arithmetic`), so that any order of adds and removes ends in the same bits, and the empty set is the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from overpaint.bases.base import Base, BrokenBase
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.safetensors_file import dtype_name, tensor_digest
from overpaint.core.encoding import combined_digest
from overpaint.core.errors import OverpaintError
from overpaint.core.names import checked_number
from overpaint.core.reporting import Progress, silent
from overpaint.patches.arithmetic import (
    DenseMap,
    FactoredMap,
    Original,
    ScratchBuffers,
    Target,
    TensorUpdate,
    side_by_side,
)
from overpaint.patches.delta import BadDelta, Delta, Factors, TextMap, Xor, all_finite


@dataclass(frozen=True)
class Term:
    """One patch of a composition: its id (the sort key), its delta and its strength."""

    id: str
    delta: Delta
    strength: float = 1.0

    def __post_init__(self) -> None:
        checked_number(self.strength, f"the strength of patch {self.id[:12]}")


PatchPart = tuple[Term, Delta]
"""One part of a patch's delta, with the patch it belongs to."""


@dataclass(frozen=True, eq=False)
class Stack:
    """The patches that change a tensor, by id. Tensors with the same patches share one: a thousand are sorted once."""

    pieces: tuple[PatchPart, ...]
    work: ScratchBuffers = field(repr=False)
    joined_maps: dict[Any, FactoredMap | DenseMap] = field(default_factory=dict, repr=False)
    """Text maps side by side; one for all the stacks of a plan."""
    changes: dict[int, TensorUpdate] = field(default_factory=dict, repr=False)
    """What text maps alone add to tensors that are so wide; the columns of a text input depend on nothing else."""

    @cached_property
    def with_bits(self) -> dict[str, Term]:
        """The patches with residual bits; whatever else they hold is in neither `texts` nor `others`."""
        return {term.id: term for term, part in self.pieces if isinstance(part, Xor)}

    @cached_property
    def texts(self) -> list[tuple[str, FactoredMap | DenseMap]]:
        """Text maps side by side, by text input, text inputs sorted."""
        maps: dict[str, list[tuple[Term, TextMap]]] = {}
        for term, part in self.pieces:
            if isinstance(part, TextMap) and term.id not in self.with_bits:
                maps.setdefault(part.encoder, []).append((term, part))
        return [(text_input, self._text(text_input, maps[text_input])) for text_input in sorted(maps)]

    @cached_property
    def others(self) -> list[PatchPart]:
        """All that is neither a text map nor of a patch with residual bits."""
        return [(t, part) for t, part in self.pieces if t.id not in self.with_bits and not isinstance(part, TextMap)]

    @cached_property
    def is_alone_with_bits(self) -> bool:
        """Whether all pieces are one patch's, at strength 1, with residual bits among them."""
        first = self.pieces[0][0]
        return first.strength == 1 and bool(self.with_bits) and all(term is first for term, _ in self.pieces)

    def alone(self, term: Term) -> tuple[Xor, Stack]:
        """A patch with residual bits by itself: the bits, and its other parts at strength 1."""
        parts = [part for owner, part in self.pieces if owner is term]
        (bits,) = (part for part in parts if isinstance(part, Xor))
        others = tuple((replace(term, strength=1.0), part) for part in parts if part is not bits)
        return bits, Stack(others, self.work, self.joined_maps)

    def _text(self, text_input: str, maps: Sequence[tuple[Term, TextMap]]) -> FactoredMap | DenseMap:
        key = (text_input, *((term.id, term.strength) for term, _ in maps))
        if key not in self.joined_maps:
            self.joined_maps[key] = side_by_side([(text_map, term.strength) for term, text_map in maps], self.work)
        return self.joined_maps[key]


@dataclass(frozen=True, eq=False)
class CompositionPlan:
    """A composition that is checked but not yet computed: which tensors change, and each value on demand.

    `terms` are all that was planned, sorted by patch id; `stacks` has, by canonical name, the patches that change each tensor.
    Values take turns in one scratch memory: ask for them from one thread at a time.
    """

    base: Base
    terms: tuple[Term, ...]
    stacks: Mapping[str, Stack]
    _work: ScratchBuffers = field(repr=False)

    @property
    def names(self) -> list[str]:
        """Canonical names of the tensors that change, sorted."""
        return list(self.stacks)

    @cached_property
    def pieces(self) -> dict[str, tuple[PatchPart, ...]]:
        """By canonical name, the parts of patches that change each tensor, by patch id."""
        return {name: stack.pieces for name, stack in self.stacks.items()}

    def original(self, name: str) -> Original:
        """The base's own value of a tensor. Raises BrokenBase when it has NaN or infinite values."""
        values = self.base.tensor(name)
        low, high = (float(end) for end in torch.aminmax(values)) if values.numel() else (0.0, 0.0)
        if not math.isfinite(high - low):
            raise BrokenBase(
                f"{name} of the base at {self.base.path} has values that are not finite; get the base again"
            )
        return Original(values, max(-low, high))

    @own_torch_settings()
    def tensor(self, name: str) -> Tensor:
        """The composed value of one tensor, on the CPU, in the base's dtype; computed anew at every call.

        Raises BadDelta when the sum overflows the dtype.
        """
        original = self.original(name)
        with torch.inference_mode():
            self.write(name, Target(original, original.values, self._work))
        return original.values

    def check_range(self, name: str) -> None:
        """Raise BadDelta when the sum overflows the tensor's dtype; composes it only where a bound leaves that open."""
        original, stack = self.original(name), self.stacks[name]
        largest = torch.finfo(original.values.dtype).max
        if stack.is_alone_with_bits or self._change(name, stack, original).bound(original.peak) > largest:
            self.tensor(name)

    def change(self, name: str) -> Tensor:
        """What is added to a tensor before rounding: float64, of the tensor's shape.

        Where patches have residual bits it is the difference that composing makes, since bits belong to one rounded result.
        """
        stack = self.stacks[name]
        if stack.with_bits:
            return self.tensor(name).double() - self.base.tensor(name).double()
        if factors := self.thin_factors(name):
            return (factors[0] @ factors[1]).reshape(self.base.places[name].shape)
        original = self.base.tensor(name)
        return torch.stack([part.change(self.base, name, original) * t.strength for t, part in stack.pieces]).sum(0)

    def thin_factors(self, name: str) -> Factors | None:
        """That change as `up` (out x r) and `down` (r x in), float64, strengths in `up`; None where a part has no factors."""
        ups, downs, pieces = [], [], self.stacks[name].pieces
        original = self.original(name).values if any(part.text_maps for _, part in pieces) else None
        for term, part in pieces:
            if (pair := part.thin_factors(self.base, name, original)) is None:
                return None
            ups.append(pair[0] * term.strength)
            downs.append(pair[1])
        return torch.cat(ups, 1), torch.cat(downs, 0)

    def write(self, name: str, target: Target) -> None:
        """Put the composed value of one tensor where it belongs; in inference mode and with `own_torch_settings`.

        Raises BadDelta when the sum overflows the dtype; what overflowed has then been written.
        """
        stack = self.stacks[name]
        if stack.is_alone_with_bits:
            target.out.copy_(self._result(name, stack, stack.pieces[0][0], target.original))
            bound = math.inf
        else:
            change = stack.changes.get(target.width) or self._change(name, stack, target.original)
            change.write(target)
            bound = change.bound(target.original.peak)
        # Looking at every value would take a third of the time that composing takes.
        if bound > target.largest and not all_finite(target.out):
            patches = ", ".join(dict.fromkeys(term.id[:12] for term, _ in stack.pieces if term.id))
            overflows = f"{name} overflows {dtype_name(target.out.dtype)}"
            if not patches:  # a change that is no patch yet
                raise BadDelta(f"{overflows} with this change, which is too large for this base; scale it down")
            raise BadDelta(f"{overflows} under patches {patches}; lower their strengths")

    def _change(self, name: str, stack: Stack, original: Original) -> TensorUpdate:
        """All that is added to one tensor. A patch with residual bits counts as the difference that it makes alone."""
        texts = tuple((self.base.columns(text_input, name), text) for text_input, text in stack.texts)
        if texts and not stack.others and not stack.with_bits:
            return stack.changes.setdefault(original.values.shape[-1], TensorUpdate(texts))
        added = [(part.addend(self.base, name, original.values), term.strength) for term, part in stack.others]
        return TensorUpdate(
            texts=texts,
            factors=tuple((*each, strength) for each, strength in added if not isinstance(each, Tensor)),
            arrays=tuple((each, strength) for each, strength in added if isinstance(each, Tensor)),
            results=tuple((self._result(name, stack, t, original), t.strength) for t in stack.with_bits.values()),
        )

    def _result(self, name: str, stack: Stack, term: Term, original: Original) -> Tensor:
        """What one patch with residual bits makes of a tensor alone, at strength 1."""
        bits, others = stack.alone(term)
        rounded = torch.empty_like(original.values)
        self._change(name, others, original).write(Target(original, rounded, self._work))
        return bits.flipped(name, rounded)


def plan(base: Base, terms: Iterable[Term], work: ScratchBuffers | None = None) -> CompositionPlan:
    """Check everything that needs no tensor's values. A term of strength 0 is checked, and then as good as absent.

    `work` is scratch memory to share with plans that take turns.

    Raises BadDelta when a delta names a tensor the base lacks or does not fit one, Unchangeable when one is quantised,
    OverpaintError when a patch is given twice.
    """
    ordered = sorted(terms, key=lambda term: term.id)
    if len({term.id for term in ordered}) != len(ordered):
        raise OverpaintError("a composition holds each patch once; change its strength instead of adding it again")
    work = work or ScratchBuffers()
    stacks = _stacked(base, ordered, work)
    base.check_changeable(stacks)
    return CompositionPlan(base, tuple(ordered), stacks, work)


def _stacked(base: Base, terms: Sequence[Term], work: ScratchBuffers) -> dict[str, Stack]:
    """By name, sorted, the patches that change each tensor; one and the same stack for the same pieces."""
    # Pieces that reach the same tensors are grouped: a thousand text maps are not sorted tensor by tensor.
    alike: dict[tuple[str, ...], list[tuple[int, PatchPart]]] = {}
    for at, piece in enumerate((term, part) for term in terms for part in term.delta.parts):
        targets = tuple(piece[1].targets(base))
        if piece[0].strength:
            alike.setdefault(targets, []).append((at, piece))
    groups, numbers_by_name = list(alike.values()), dict[str, list[int]]()
    for number, targets in enumerate(alike):
        for name in targets:
            numbers_by_name.setdefault(name, []).append(number)
    joined_maps: dict[Any, FactoredMap | DenseMap] = {}
    stacks: dict[tuple[int, ...], Stack] = {}
    for numbers in {tuple(numbers) for numbers in numbers_by_name.values()}:
        pieces = sorted((each for number in numbers for each in groups[number]), key=itemgetter(0))
        stacks[numbers] = Stack(tuple(piece for _, piece in pieces), work, joined_maps)
    return {name: stacks[tuple(numbers_by_name[name])] for name in sorted(numbers_by_name)}


def compose(base: Base, terms: Iterable[Term], progress: Progress = silent) -> dict[str, Tensor]:
    """The changed tensors, in the base's dtypes, by canonical name; empty for no terms.

    Raises what `plan` raises, and BadDelta when a sum overflows a dtype.
    """
    planned = plan(base, terms)
    composed = {}
    for name in planned.names:
        composed[name] = planned.tensor(name)
        progress(len(composed), len(planned.names), "composing")
    return composed


def composition_digest(base: Base, composed: dict[str, Tensor]) -> str:
    """The digest of the whole model with the `composed` tensors: the base's fingerprint when nothing is changed."""
    digests = base.digests(base.names)
    digests.update({name: tensor_digest(name, tensor) for name, tensor in composed.items()})
    return combined_digest(digests)
