"""The formats that are written, and where each keeps a tensor's change.

Every change gets the smallest form that a format's readers know: factors, a difference, or the whole weight. What has no
place in a format is refused; nothing is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from overpaint.bases.base import Base
from overpaint.bases.container import DTYPES
from overpaint.errors import OverpaintError
from overpaint.patches.compose import Plan
from overpaint.patches.formats import diffusers_lora, kohya, weights
from overpaint.patches.formats.changes import (
    Stored,
    is_thin,
    rank,
    stored_difference,
    stored_factors,
    stored_nothing,
    stored_truncated,
    stored_whole,
)
from overpaint.patches.formats.modules import ENCODERS, UNET, split
from overpaint.patches.formats.writing import Slot


class NotExportable(OverpaintError):
    """Patches that a format has no place for."""


@dataclass(frozen=True)
class Format:
    """A format to write: who reads it, how it spells a base's modules, and what it has a place for.

    `factors` are the endings of the keys of down, up and, in some, alpha; `differences` says whether readers also add
    arrays, `whole` that it holds weights instead.
    """

    about: str
    spelled: Callable[[Base], Mapping[str, str]]
    factors: tuple[str, ...] = ()
    differences: bool = False
    whole: bool = False


FORMATS: Mapping[str, Format] = {
    "kohya": Format(
        "LoRA for ComfyUI, A1111, Forge, kohya's scripts and diffusers",
        kohya.written,
        (".lora_down.weight", ".lora_up.weight", ".alpha"),
    ),
    "diffusers": Format("LoRA for diffusers and PEFT", diffusers_lora.written, (".lora_A.weight", ".lora_B.weight")),
    "comfy-diff": Format(
        "LoRA where it fits and full differences elsewhere, for ComfyUI, A1111 and Forge",
        kohya.written,
        (".lora_down.weight", ".lora_up.weight", ".alpha"),
        differences=True,
    ),
    "full": Format("the edited weights themselves, as erasers save them", weights.written, whole=True),
}

_ENCODER_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
"""The layers of a text encoder that readers of LoRAs know."""
_OUTPUT = "self_attn.out_proj.weight"
_LAYER, _NORM = {"weight": ".diff", "bias": ".diff_b"}, {"weight": ".w_norm", "bias": ".b_norm"}


@dataclass(frozen=True)
class Piece:
    """One tensor's share of a file: where its arrays go, and how they are computed."""

    name: str
    slots: tuple[Slot, ...]
    make: Callable[[], Stored]


def place(plan: Plan, format: str, dtype: torch.dtype, truncate: int | None) -> list[Piece]:
    """Where a format keeps each changed tensor, sorted by module. Raises NotExportable when one has no place."""
    if format not in FORMATS:
        raise NotExportable(f"unknown format {format!r}; known are {', '.join(FORMATS)}")
    chosen = FORMATS[format]
    _refuse_placeless(plan, chosen, format, truncate)
    found: dict[str, set[str]] = {}
    for name in plan.names:
        module, attribute = split(name)
        found.setdefault(module, set()).add(attribute)
    rank = max((_directions(plan, name, truncate) for name in plan.names), default=0)
    placing = _Placing(plan, chosen, chosen.spelled(plan.base), dtype, truncate, rank)
    pieces = [piece for module, attributes in sorted(found.items()) for piece in placing.pieces(module, attributes)]
    return pieces if chosen.whole or chosen.differences else [*pieces, *placing.companions()]


@dataclass(frozen=True)
class _Placing:
    plan: Plan
    format: Format
    spelled: Mapping[str, str]
    dtype: torch.dtype
    truncate: int | None
    rank: int

    def pieces(self, module: str, attributes: set[str]) -> Iterator[Piece]:
        """The pieces of one module, of which these parameters change."""
        names = [f"{module}.{attribute}" for attribute in sorted(attributes, reverse=True)]
        if self.format.whole:
            yield from (self._whole(name) for name in names)
        elif not self.format.differences or (attributes == {"weight"} and is_thin(self.plan, names[0])):
            yield from (self._factors(name) for name in names)
        else:
            # Readers know a difference of a bias beside one of the weight, so a weight that stays gets an empty one.
            both = [name for name in (f"{module}.weight", f"{module}.bias") if name in self.plan.base.places]
            is_norm = len(self.plan.base.places[both[0]].shape) == 1
            yield from (
                self._difference(name, is_norm) for name in (both if is_norm else dict.fromkeys([both[0], *names]))
            )

    def companions(self) -> Iterator[Piece]:
        """A layer that does nothing for each text encoder of which the output of attention stays as it is.

        By that layer diffusers finds out how the text encoder's keys are spelled; without one it refuses the file.
        """
        for encoder in ENCODERS:
            changed = [name for name in self.plan.names if name.startswith(f"{encoder}/")]
            if changed and not any(name.endswith(_OUTPUT) for name in changed):
                every = (name for name in self.plan.base.names if name.startswith(f"{encoder}/"))
                yield from (self._nothing(name) for name in every if name.endswith(f".0.{_OUTPUT}"))

    def _whole(self, name: str) -> Piece:
        module, attribute = split(name)
        found = self.plan.base.places[name]
        slot = Slot(f"{self.spelled[module]}.{attribute}", DTYPES[found.entry.dtype], found.shape)
        return Piece(name, (slot,), lambda: stored_whole(self.plan, name))

    def _nothing(self, name: str) -> Piece:
        slots = self._slots(name)
        zeros = tuple(torch.zeros(slot.shape, dtype=slot.dtype) for slot in slots[:2])
        return Piece(name, slots, lambda: Stored((*zeros, torch.tensor(float(self.rank))), 0.0, 0, 0))

    def _factors(self, name: str) -> Piece:
        directions = _directions(self.plan, name, self.truncate)
        make = stored_factors if is_thin(self.plan, name) else stored_truncated
        return Piece(name, self._slots(name), lambda: make(self.plan, name, self.dtype, directions).padded(self.rank))

    def _slots(self, name: str) -> tuple[Slot, ...]:
        """All layers get one rank, and so one alpha: not every reader keeps layers with different ones apart."""
        shape, module = self.plan.base.places[name].shape, self.spelled[split(name)[0]]
        down, up, *alpha = self.format.factors
        return (
            Slot(f"{module}{down}", self.dtype, (self.rank, *shape[1:])),
            Slot(f"{module}{up}", self.dtype, (shape[0], self.rank, *(1,) * (len(shape) - 2))),
            *(Slot(f"{module}{ending}", torch.float32, ()) for ending in alpha),
        )

    def _difference(self, name: str, is_norm: bool) -> Piece:
        module, attribute = split(name)
        ending = (_NORM if is_norm else _LAYER)[attribute]
        slot = Slot(f"{self.spelled[module]}{ending}", self.dtype, self.plan.base.places[name].shape)
        if name not in self.plan.pieces:
            return Piece(name, (slot,), lambda: stored_nothing(self.plan, name, self.dtype))
        return Piece(name, (slot,), lambda: stored_difference(self.plan, name, self.dtype))


def _directions(plan: Plan, name: str, truncate: int | None) -> int:
    """How many directions a tensor's factors have in a file; 0 where it gets none."""
    shape = plan.base.places[name].shape
    if is_thin(plan, name):
        return rank(plan, name)
    return min(truncate or 0, shape[0], math.prod(shape[1:])) if len(shape) > 1 else 0


def _refuse_placeless(plan: Plan, chosen: Format, format: str, truncate: int | None) -> None:
    spelled = chosen.spelled(plan.base)
    refused = {
        name: why for name in plan.names if (why := _placeless(plan, chosen, name, truncate, split(name)[0] in spelled))
    }
    if refused:
        name, (reason, hint) = next(iter(refused.items()))
        raise NotExportable(
            f"{len(refused)} of {len(plan.names)} changed tensors have no place in a {format} file, first {name}: {reason}; "
            f"{hint}"
        )


def _placeless(plan: Plan, chosen: Format, name: str, truncate: int | None, has_name: bool) -> tuple[str, str] | None:
    """Why a format has no place for a tensor's change and what else to do; None when it has one."""
    module, attribute = split(name)
    if chosen.whole:
        return None
    known = name.startswith(f"{UNET}/") or module.rpartition(".")[2] in _ENCODER_LAYERS
    if not has_name or not known or attribute not in _LAYER:
        return "no reader of this format has a name for it", "export as full, or build a checkpoint"
    if chosen.differences:
        return None
    elsewhere = "export as comfy-diff or full, or build a checkpoint"
    if attribute != "weight" or len(plan.base.places[name].shape) < 2:
        return "a LoRA changes weights of linear layers and convolutions only", elsewhere
    if truncate is None and not is_thin(plan, name):
        return "its change is not of low rank", f"truncate it and be told the error, or {elsewhere}"
    return None
