"""The factors of a LoRA as a patch keeps them: two matrices whose product is the change, with nothing left to multiply."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from overpaint.patches.formats.dialect import ForeignFile, Role
from overpaint.patches.formats.files import ForeignWeights

Pair = tuple[Tensor, Tensor]
"""up (out x r) and down (r x in)."""


def factors(weights: ForeignWeights, name: str, keys: Mapping[Role, str], shape: tuple[int, ...]) -> Pair | None:
    """The factors of one weight of a shape, None where their product is zero.

    A convolution's kernel counts as the matrix out x (in h w). Alpha over rank, or what a configuration says, is folded
    into `up`; where a file says neither, the factors count as they are. Raises ForeignFile when they do not fit.
    """
    shapes = {role: weights.shapes[key][1] for role, key in keys.items()}
    if missing := {"up", "down"} - keys.keys():
        raise ForeignFile(
            f"{weights.path.name} has {next(iter(keys.values()))} without the factor {missing.pop()!r}; it is incomplete: get "
            "it again"
        )
    if not _fit(shapes, shape):
        found = " and ".join(str(list(shapes[role])) for role in ("up", "mid", "down") if role in shapes)
        raise ForeignFile(
            f"{weights.path.name} has factors {found} for {name}, which has shape {list(shape)} here; it was made for another "
            "base"
        )
    up, down = (weights.tensor(keys[role]) for role in ("up", "down"))
    if "mid" in keys:
        down = _with_core(weights.tensor(keys["mid"]), down)
    matrix = down.reshape(shapes["up"][1], -1)
    scale = _scale(weights, name, keys, shapes["down"][0])
    return _trimmed(_held(up.reshape(shape[0], -1).double() * scale, up.dtype), matrix)


def _trimmed(up: Tensor, down: Tensor) -> Pair | None:
    """The factors without directions that are zero, as padding is; None when no other is there."""
    used = (up != 0).any(0) & (down != 0).any(1)
    if bool(used.all()):
        return up, down
    return (up[:, used], down[used]) if bool(used.any()) else None


def _fit(shapes: Mapping[Role, tuple[int, ...]], shape: tuple[int, ...]) -> bool:
    """Whether factors multiply to a weight's shape."""
    up, down = shapes["up"], shapes["down"]
    whole = all(len(each) >= 2 and 0 not in each for each in (up, down, shape))
    if not whole or up[0] != shape[0] or math.prod(up[2:]) != 1:
        return False
    if "mid" not in shapes:
        return up[1] == down[0] and math.prod(down[1:]) == math.prod(shape[1:])
    core = shapes["mid"]
    return (
        len(core) == 4
        and core[:2] == (up[1], down[0])
        and math.prod(down[2:]) == 1
        and (down[1], *core[2:]) == shape[1:]
    )


def _with_core(core: Tensor, down: Tensor) -> Tensor:
    """`down` (s x in) of a kernel that was split in three, with the core (r x s x h x w) multiplied in: r x in x h x w."""
    wide = torch.einsum("abhw,bi->aihw", core.double(), down.double().reshape(down.shape[:2]))
    return _held(wide, down.dtype)


def _held(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """A float64 array in a dtype, or float32, where that loses no bit."""
    narrow = (wide.to(each) for each in (dtype, torch.float32))
    return next((each for each in narrow if torch.equal(each.double(), wide)), wide)


def _scale(weights: ForeignWeights, name: str, keys: Mapping[Role, str], rank: int) -> float:
    if "alpha" in keys:
        alpha = weights.tensor(keys["alpha"])
        if alpha.numel() != 1:
            raise ForeignFile(f"{keys['alpha'][:100]} has {alpha.numel()} values instead of one; get the file again")
        return float(alpha) / rank
    component, _, local = name.removesuffix(".weight").partition("/")
    config = weights.configs.get(component, weights.configs.get(""))
    return 1.0 if config is None else config.scale(local, rank)
