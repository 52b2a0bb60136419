"""What patches add to one tensor, in the form that a LoRA or a difference file can hold, and how far the stored form is off.

Factors are kept as they are where that loses nothing beyond the rounding of the stored dtype: the text map's `down = D^T`,
`up = W0 U`, a low-rank patch's own. Factors of several patches stand side by side; more of them than the tensor has rows
or columns are reduced to as many without loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from overpaint.patches.compose import Piece, Plan
from overpaint.patches.delta import LowRank, TextMap, Xor
from overpaint.patches.formats.fitting import leading

ROUNDING = 2.0**-22
"""Four roundings of float32. A stored change that is off by no more, as a part of itself, counts as exact."""


@dataclass(frozen=True)
class Stored:
    """A tensor's change as a file holds it (the arrays, in the file's dtype), the relative error that storing made, and how
    many of the composed values come out differently when a reader adds it to the base."""

    arrays: tuple[Tensor, ...]
    error: float
    differing: int
    of: int

    def padded(self, directions: int) -> Stored:
        """Factors with so many directions, those that are missing zero; alpha is their number."""
        down, up, _ = self.arrays
        more = directions - len(down)
        arrays = (pad(down, (0, 0, 0, more)), pad(up, (0, more)), torch.tensor(float(directions)))
        return replace(self, arrays=arrays)


def is_thin(plan: Plan, name: str) -> bool:
    """Whether all that lies on a tensor is made of thin factors."""
    thin = all(isinstance(part, TextMap | LowRank) for _, part in plan.pieces[name])
    return thin and len(plan.base.places[name].shape) > 1


def rank(plan: Plan, name: str) -> int:
    """How many directions the factors of a tensor take in a file."""
    shape = plan.base.places[name].shape
    return min(sum(_directions(piece, name) for piece in plan.pieces[name]), shape[0], math.prod(shape[1:]))


def _directions(piece: Piece, name: str) -> int:
    part = piece[1]
    assert isinstance(part, TextMap | LowRank)
    return part.up.shape[1] if isinstance(part, TextMap) else part.factors[name][0].shape[1]


def stored_factors(plan: Plan, name: str, dtype: torch.dtype, directions: int) -> Stored:
    """down (r x in), up (out x r) and r of a tensor on which only thin factors lie; `directions` is its `rank`."""
    up, down = _product(plan, name, plan.pieces[name], plan.original(name).values)
    true = up @ down
    found = [_stored(plan, name, true, (up, down), dtype)] if up.shape[1] == directions else []
    if not found or found[0].error > ROUNDING:
        # Factors that nearly cancel lose more to rounding than an orthonormal side does.
        found.append(_stored(plan, name, true, _orthonormal(up, down), dtype))
    return min(found, key=lambda each: each.error)


def stored_truncated(plan: Plan, name: str, dtype: torch.dtype, directions: int) -> Stored:
    """down, up and rank of any change, cut to so many directions."""
    true = change(plan, name).reshape(plan.base.places[name].shape[0], -1)
    up, values, down = leading(true, directions, rounds=8)
    root = values.sqrt()
    return _stored(plan, name, true, (up * root, root[:, None] * down), dtype)


def stored_difference(plan: Plan, name: str, dtype: torch.dtype) -> Stored:
    """The change itself, of the tensor's shape."""
    true = change(plan, name)
    array = true.to(dtype)
    return Stored((array,), _relative(array.double() - true, true), *_differing(plan, name, array.double()))


def stored_nothing(plan: Plan, name: str, dtype: torch.dtype) -> Stored:
    """The change of a tensor on which nothing lies."""
    return Stored((torch.zeros(plan.base.places[name].shape, dtype=dtype),), 0.0, 0, 0)


def stored_whole(plan: Plan, name: str) -> Stored:
    """The composed weight, in the base's dtype."""
    value = plan.tensor(name)
    return Stored((value,), 0.0, 0, value.numel())


def change(plan: Plan, name: str) -> Tensor:
    """What is added to a tensor, float64, of the tensor's shape.

    Where patches have residual bits it is the difference that composing makes, since bits belong to one rounded result.
    """
    original = plan.original(name).values
    if any(isinstance(part, Xor) for _, part in plan.pieces[name]):
        return plan.tensor(name).double() - original.double()
    total = torch.zeros(original.shape, dtype=torch.float64)
    thin = [piece for piece in plan.pieces[name] if isinstance(piece[1], TextMap | LowRank)]
    if thin:
        up, down = _product(plan, name, thin, original)
        total += (up @ down).reshape(original.shape)
    for term, part in plan.pieces[name]:
        if not isinstance(part, TextMap | LowRank):
            total += part.tensors()[name].double() * term.strength
    return total


def _product(plan: Plan, name: str, pieces: Sequence[Piece], original: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of some pieces side by side, float64, strengths in `up`."""
    ups, downs = [], []
    for term, part in pieces:
        if isinstance(part, TextMap):
            columns = plan.base.columns(part.encoder, name)
            down = torch.zeros(part.up.shape[1], original.shape[1], dtype=torch.float64)
            down[:, columns] = part.down.double().T
            ups.append(original[:, columns].double() @ part.up.double() * term.strength)
            downs.append(down)
        elif isinstance(part, LowRank):
            up, thin = part.factors[name]
            ups.append(up.double() * term.strength)
            downs.append(thin.double())
    return torch.cat(ups, 1), torch.cat(downs, 0)


def _orthonormal(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with orthonormal rows in `down`, and no more directions than `up` has rows."""
    basis, rest = torch.linalg.qr(down.T)
    up, down = up @ rest.T, basis.T
    if up.shape[1] > up.shape[0]:
        basis, rest = torch.linalg.qr(up)
        up, down = basis, rest @ down
    return up, down


def _stored(plan: Plan, name: str, true: Tensor, pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> Stored:
    up, down = (side.to(dtype) for side in pair)
    held, alpha = up.double() @ down.double(), torch.tensor(float(up.shape[1]))
    return Stored((down, up, alpha), _relative(held - true, true), *_differing(plan, name, held))


def _relative(apart: Tensor, true: Tensor) -> float:
    size = float(true.norm())
    return float(apart.norm()) / size if size else float(bool(apart.any()))


def _differing(plan: Plan, name: str, held: Tensor) -> tuple[int, int]:
    """How many composed values differ when a reader adds what a file holds to the base's weight, and of how many."""
    original, composed = plan.original(name).values, plan.tensor(name)
    read = (original.double() + held.reshape(original.shape)).to(original.dtype)
    return int((read != composed).sum()), composed.numel()
