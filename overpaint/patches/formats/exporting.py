"""Export: patches on a base as a file that another tool loads; what is lost on the way is measured and reported.

Every change gets the smallest form that a format's readers know: factors, a difference, or the whole weight. Factors are kept
as they are where that loses nothing beyond the rounding of the stored dtype: the text map's `down = D^T`, `up = W0 U`, a
low-rank patch's own. Those of several patches stand side by side; more of them than the tensor has rows or columns are
reduced to as many without loss. What has no place in a format is refused; nothing is left out.

Of the texts in a header, which user interfaces show, `ss_…` are kohya's, `sshs_…` A1111's, `modelspec.…` those of the
Stability model metadata specification. Nothing depends on when or where a file is written: the same arrays and texts give the
same bytes. The digest of everything after the header stands in the header too, and is filled in at the end.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from overpaint.bases.base import Base
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.safetensors_file import DTYPES, raw_bytes
from overpaint.core import __version__
from overpaint.core.atomic import atomic_output, refuse_taken
from overpaint.core.encoding import canonical_json, header_bytes
from overpaint.core.errors import OverpaintError
from overpaint.core.names import shown
from overpaint.core.reporting import Progress, silent
from overpaint.patches.arithmetic import Fitted, leading
from overpaint.patches.compose import CompositionPlan, Term, plan
from overpaint.patches.delta import Factors, all_finite
from overpaint.patches.formats import dialects
from overpaint.patches.formats.dialects import (
    DENOISERS,
    ENCODERS,
    PEFT_PREFIX,
    READERS,
    Reader,
    open_clip_encoders,
    reader,
    split,
)

KEY = "overpaint.export"
UNKNOWN = "0" * 64
"""Stands for the digest of the bytes that follow the header, until they are written."""


@dataclass(frozen=True)
class About:
    """What an export is of: a title, each patch's id, concept and strength, and the day of the newest (YYYY-MM-DD), if known."""

    title: str
    patches: Sequence[tuple[str, str, float]] = ()
    day: str = ""


def header_of(base: Base, about: About, format: str, ranks: Sequence[int]) -> dict[str, str]:
    """The header of an export. `ranks` are those of the LoRA layers in it, none for a file of another kind."""
    version, architecture = _architecture(base)
    concepts = ", ".join(concept for _, concept, _ in about.patches)
    patches = [{"id": id, "concept": concept, "strength": strength} for id, concept, strength in about.patches]
    kind = "lora" if ranks else "weights"
    texts = {
        "format": "pt",
        KEY: canonical_json({"base": base.fingerprint, "format": format, "patches": patches}).decode(),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/{kind}",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": about.title,
        "modelspec.description": f"Erases {concepts or 'nothing by name'}; written by Overpaint {__version__}",
        "modelspec.usage_hint": "Use at strength 1; at 0 what is erased comes back.",
        "modelspec.tags": "concept erasure",
        "modelspec.merged_from": ", ".join(id for id, _, _ in about.patches),
        "modelspec.hash_sha256": f"0x{UNKNOWN}",
        "sshs_model_hash": UNKNOWN,
        "ss_base_model_version": version,
        "ss_v2": str(version == "sd_v2"),
        # A1111 writes this into prompts, as <lora:NAME:1>.
        "ss_output_name": re.sub("[<:>]", "_", about.title),
        **({"modelspec.date": about.day} if about.day else {}),
    }
    if ranks:
        dim = str(max(ranks))
        texts |= {
            "ss_network_module": "networks.lora",
            "ss_network_dim": dim,
            "ss_network_alpha": dim,
            "ss_network_args": "{}",
        }
    return dict(sorted(texts.items()))


def with_digest(header: Mapping[str, str], digest: str) -> dict[str, str]:
    """A header with the digest of the bytes that follow it."""
    return {key: text.replace(UNKNOWN, digest) if text.endswith(UNKNOWN) else text for key, text in header.items()}


_TRANSFORMERS = {"flux": ("flux1", "flux-1-dev"), "stable-diffusion-3": ("sd3", "stable-diffusion-3")}


def _architecture(base: Base) -> tuple[str, str]:
    """What kohya's scripts and the model specification call it."""
    if base.layout.name == "stable-diffusion-xl":
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    if base.layout.is_caught:
        return _TRANSFORMERS.get(base.layout.name, (base.layout.name, base.layout.name))
    is_2 = ENCODERS[0] in open_clip_encoders(base)
    return ("sd_v2", "stable-diffusion-v2-768-v") if is_2 else ("sd_v1", "stable-diffusion-v1")


_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class ArraySlot:
    """An array's place in a file, known before its values."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def write_file(out: Path, header: Mapping[str, str], slots: Sequence[ArraySlot], arrays: Iterator[Tensor]) -> None:
    """Write a new file whole or not at all; `arrays` come in the order of `slots`.

    Raises AlreadyExists when `out` is there, OverpaintError when nothing can be written.
    """
    listed = [(slot.key, _CODES[slot.dtype], tuple(slot.shape)) for slot in slots]
    head = header_bytes(header, listed)
    with atomic_output(out) as scratch, scratch.open("xb") as file:
        file.write(head)
        digest = hashlib.sha256()
        for slot, array in zip(slots, arrays, strict=True):
            assert (array.dtype, tuple(array.shape)) == (slot.dtype, slot.shape), slot.key
            data = raw_bytes(array)
            digest.update(data)
            file.write(data)
        file.seek(0)
        file.write(header_bytes(with_digest(header, digest.hexdigest()), listed))


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


def is_thin(plan: CompositionPlan, name: str) -> bool:
    """Whether the change of a tensor is made of thin factors."""
    thin = all(part.directions(name) is not None for _, part in plan.pieces[name])
    return thin and len(plan.base.places[name].shape) > 1


def rank(plan: CompositionPlan, name: str) -> int:
    """How many directions the factors of a tensor take in a file."""
    shape = plan.base.places[name].shape
    return min(sum(part.directions(name) or 0 for _, part in plan.pieces[name]), shape[0], math.prod(shape[1:]))


def stored_factors(plan: CompositionPlan, name: str, dtype: torch.dtype, directions: int) -> Stored:
    """down (r x in), up (out x r) and r of a tensor whose change is made of thin factors; `directions` is its `rank`."""
    factors = plan.thin_factors(name)
    assert factors is not None, name
    up, down = factors
    rounded = [_rounded((up, down), dtype)] if up.shape[1] == directions else []
    errors = [_error((up, down), pair) for pair in rounded]
    if not errors or errors[0] > ROUNDING:
        # Factors that nearly cancel lose more to rounding than an orthonormal side does.
        rounded.append(_rounded(_orthonormal(up, down), dtype))
        errors.append(_error((up, down), rounded[-1]))
    error, pair = min(zip(errors, rounded, strict=True), key=itemgetter(0))
    return _stored(plan, name, pair, error, is_same=_is_same(pair, (up, down)))


def stored_truncated(plan: CompositionPlan, name: str, dtype: torch.dtype, directions: int) -> Stored:
    """down, up and rank of any change, cut to so many directions."""
    true = plan.change(name).reshape(plan.base.places[name].shape[0], -1)
    up, values, down = leading(true, directions, rounds=8)
    root = values.sqrt()
    pair = _rounded((up * root, root[:, None] * down), dtype)
    return _stored(plan, name, pair, _relative(pair[0].double() @ pair[1].double() - true, true))


def stored_difference(plan: CompositionPlan, name: str, dtype: torch.dtype) -> Stored:
    """The change itself, of the tensor's shape."""
    true = plan.change(name)
    array = true.to(dtype)
    return Stored((array,), _relative(array.double() - true, true), *_differing(plan, name, Fitted(array=array)))


def stored_nothing(plan: CompositionPlan, name: str, dtype: torch.dtype) -> Stored:
    """The change of a tensor that has none: zeros."""
    return Stored((torch.zeros(plan.base.places[name].shape, dtype=dtype),), 0.0, 0, 0)


def stored_whole(plan: CompositionPlan, name: str) -> Stored:
    """The composed weight, in the base's dtype."""
    value = plan.tensor(name)
    return Stored((value,), 0.0, 0, value.numel())


def _orthonormal(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with orthonormal rows in `down`, and no more directions than `up` has rows."""
    basis, rest = torch.linalg.qr(down.T)
    up, down = up @ rest.T, basis.T
    if up.shape[1] > up.shape[0]:
        basis, rest = torch.linalg.qr(up)
        up, down = basis, rest @ down
    return up, down


def _rounded(pair: Factors, dtype: torch.dtype) -> Factors:
    up, down = pair
    return up.to(dtype), down.to(dtype)


def _is_same(pair: Factors, wide: Factors) -> bool:
    """Whether rounding changed no factor."""
    return all(torch.equal(narrow.double(), side) for narrow, side in zip(pair, wide, strict=True))


def _error(true: Factors, held: Factors) -> float:
    """The norm of the difference of two products over that of the first."""
    if _is_same(held, true):
        return 0.0
    (up, down), (held_up, held_down) = true, held
    return _relative(
        _core(torch.cat([held_up.double(), -up], 1), torch.cat([held_down.double(), down])), _core(up, down)
    )


def _core(up: Tensor, down: Tensor) -> Tensor:
    """A small matrix with the singular values of a product, which is not formed: it has a million values."""
    core: Tensor = torch.linalg.qr(up)[1] @ torch.linalg.qr(down.T)[1].T
    return core


def _stored(plan: CompositionPlan, name: str, pair: Factors, error: float, *, is_same: bool = False) -> Stored:
    """A pair of factors as a file has it. Where it is the patches' own (`is_same`), a reader adds what composing adds."""
    up, down = pair
    differing = (
        (0, math.prod(plan.base.places[name].shape)) if is_same else _differing(plan, name, Fitted(factors=pair))
    )
    return Stored((down, up, torch.tensor(float(up.shape[1]))), error, *differing)


def _relative(apart: Tensor, true: Tensor) -> float:
    size = float(true.norm())
    return float(apart.norm()) / size if size else float(bool(apart.any()))


def _differing(plan: CompositionPlan, name: str, held: Fitted) -> tuple[int, int]:
    """How many composed values differ when a reader adds what a file holds to the base's weight, and of how many."""
    read, composed = held.added_to(plan.original(name).values), plan.tensor(name)
    return (0 if torch.equal(read, composed) else int((read != composed).sum())), composed.numel()


class NotExportable(OverpaintError):
    """Patches that a format has no place for."""


@dataclass(frozen=True)
class Format:
    """A format to write: what it is, how it names a base's modules, and what it has a place for.

    `factors` are the endings of the keys of down, up and, in some, alpha; `differences` says whether readers also add
    arrays, `whole` that it holds weights instead.
    """

    about: str
    module_names: Callable[[Base], Mapping[str, str]]
    factors: tuple[str, ...] = ()
    differences: bool = False
    whole: bool = False


FORMATS: Mapping[str, Format] = {
    "kohya": Format(
        "LoRA by kohya's names",
        dialects.kohya_written,
        (".lora_down.weight", ".lora_up.weight", ".alpha"),
    ),
    "diffusers": Format("LoRA by diffusers' names", dialects.diffusers_written, (".lora_A.weight", ".lora_B.weight")),
    "comfy-diff": Format(
        "LoRA where it fits and full differences elsewhere",
        dialects.kohya_written,
        (".lora_down.weight", ".lora_up.weight", ".alpha"),
        differences=True,
    ),
    "full": Format("the edited weights themselves, as erasers save them", dialects.weights_written, whole=True),
}

_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_ENCODER_LAYERS = (*_ATTENTION, "fc1", "fc2")
"""The layers of a text encoder that readers of LoRAs know."""
_OUTPUT = "self_attn.out_proj.weight"
_LAYER, _NORM = {"weight": ".diff", "bias": ".diff_b"}, {"weight": ".w_norm", "bias": ".b_norm"}


@dataclass(frozen=True)
class TensorExport:
    """One tensor's share of a file: where its arrays go, and how they are computed."""

    name: str
    slots: tuple[ArraySlot, ...]
    make: Callable[[], Stored]


def place(plan: CompositionPlan, format: str, dtype: torch.dtype, truncate: int | None) -> list[TensorExport]:
    """Where a format keeps each changed tensor, sorted by module. Raises NotExportable when one has no place."""
    if format not in FORMATS:
        raise NotExportable(f"unknown format {format!r}; known are {', '.join(FORMATS)}")
    chosen = FORMATS[format]
    _refuse_placeless(plan, chosen, format, truncate)
    keys: dict[str, set[str]] = {}
    for name in plan.names:
        module, attribute = split(name)
        keys.setdefault(module, set()).add(attribute)
    rank = max(1, *(_count_directions(plan, name, truncate) for name in plan.names))
    placing = _Placing(plan, chosen, chosen.module_names(plan.base), dtype, truncate, rank)
    pieces = [piece for module, attributes in sorted(keys.items()) for piece in placing.pieces(module, attributes)]
    return pieces if chosen.whole else [*pieces, *placing.companions({piece.name for piece in pieces})]


@dataclass(frozen=True)
class _Placing:
    plan: CompositionPlan
    format: Format
    module_names: Mapping[str, str]
    dtype: torch.dtype
    truncate: int | None
    rank: int

    def pieces(self, module: str, attributes: set[str]) -> Iterator[TensorExport]:
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

    def companions(self, held: set[str]) -> Iterator[TensorExport]:
        """Layers that do nothing, beside what the file holds of text encoders.

        A1111 applies nothing to an attention built by OpenCLIP unless the file has all four of its matrices. And by the
        output of an attention diffusers finds out how a text encoder's keys are named; without one it refuses the file.
        """
        wanted = set()
        for encoder in ENCODERS:
            changed = {name for name in held if name.startswith(f"{encoder}/")}
            if encoder in open_clip_encoders(self.plan.base):
                attentions = {name.partition(".self_attn.")[0] for name in changed if ".self_attn." in name}
                wanted |= {f"{layer}.self_attn.{part}.weight" for layer in attentions for part in _ATTENTION}
            if changed and not self.format.differences and not any(n.endswith(_OUTPUT) for n in changed | wanted):
                wanted |= {
                    n for n in self.plan.base.names if n.startswith(f"{encoder}/") and n.endswith(f".0.{_OUTPUT}")
                }
        yield from (self._nothing(name) for name in sorted(wanted - held))

    def _whole(self, name: str) -> TensorExport:
        module, attribute = split(name)
        place = self.plan.base.places[name]
        slot = ArraySlot(f"{self.module_names[module]}.{attribute}", DTYPES[place.entry.dtype], place.shape)
        return TensorExport(name, (slot,), lambda: stored_whole(self.plan, name))

    def _nothing(self, name: str) -> TensorExport:
        slots = self._slots(name)
        zeros = tuple(torch.zeros(slot.shape, dtype=slot.dtype) for slot in slots[:2])
        return TensorExport(name, slots, lambda: Stored((*zeros, torch.tensor(float(self.rank))), 0.0, 0, 0))

    def _factors(self, name: str) -> TensorExport:
        directions = _count_directions(self.plan, name, self.truncate)
        make = stored_factors if is_thin(self.plan, name) else stored_truncated
        return TensorExport(
            name, self._slots(name), lambda: make(self.plan, name, self.dtype, directions).padded(self.rank)
        )

    def _slots(self, name: str) -> tuple[ArraySlot, ...]:
        """All layers get one rank, and so one alpha: not every reader keeps layers with different ones apart."""
        shape, module = self.plan.base.places[name].shape, self.module_names[split(name)[0]]
        down, up, *alpha = self.format.factors
        return (
            ArraySlot(f"{module}{down}", self.dtype, (self.rank, *shape[1:])),
            ArraySlot(f"{module}{up}", self.dtype, (shape[0], self.rank, *(1,) * (len(shape) - 2))),
            *(ArraySlot(f"{module}{ending}", torch.float32, ()) for ending in alpha),
        )

    def _difference(self, name: str, is_norm: bool) -> TensorExport:
        module, attribute = split(name)
        ending = (_NORM if is_norm else _LAYER)[attribute]
        slot = ArraySlot(f"{self.module_names[module]}{ending}", self.dtype, self.plan.base.places[name].shape)
        if name not in self.plan.pieces:
            return TensorExport(name, (slot,), lambda: stored_nothing(self.plan, name, self.dtype))
        return TensorExport(name, (slot,), lambda: stored_difference(self.plan, name, self.dtype))


def _count_directions(plan: CompositionPlan, name: str, truncate: int | None) -> int:
    """How many directions a tensor's factors have in a file; 0 where it gets none."""
    shape = plan.base.places[name].shape
    if is_thin(plan, name):
        return rank(plan, name)
    return min(truncate or 0, shape[0], math.prod(shape[1:])) if len(shape) > 1 else 0


def _refuse_placeless(plan: CompositionPlan, chosen: Format, format: str, truncate: int | None) -> None:
    module_names = chosen.module_names(plan.base)
    refused = {
        name: why
        for name in plan.names
        if (why := _placeless(plan, chosen, name, truncate, split(name)[0] in module_names))
    }
    if refused:
        name, (reason, hint) = next(iter(refused.items()))
        raise NotExportable(
            f"{len(refused)} of {len(plan.names)} changed tensors have no place in a {format} file, first {name}: {reason}; "
            f"{hint}"
        )


def _placeless(
    plan: CompositionPlan, chosen: Format, name: str, truncate: int | None, has_name: bool
) -> tuple[str, str] | None:
    """Why a format has no place for a tensor's change and what else to do; None when it has one."""
    module, attribute = split(name)
    if chosen.whole:
        return None
    known = name.partition("/")[0] in DENOISERS or module.rpartition(".")[2] in _ENCODER_LAYERS
    if not has_name or not known or attribute not in _LAYER:
        return "no reader of this format has a name for it", "export as full, or build a checkpoint"
    if chosen.differences:
        return None
    elsewhere = "export as comfy-diff or full, or build a checkpoint"
    if attribute != "weight" or len(plan.base.places[name].shape) < 2:
        return "a LoRA changes weights of linear layers and convolutions only", elsewhere
    if truncate is None and not is_thin(plan, name):
        return "its change is not of low rank", f"truncate it, which reports the error, or {elsewhere}"
    return None


STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """What was written: where, and, by tensor, the relative error that storing its change made.

    `differing` of `of` composed values come out differently when a reader adds what the file holds to the base. `skipped` has,
    by tool that reads the format, the changed tensors that it passes over.
    """

    path: Path
    format: str
    errors: Mapping[str, float] = field(repr=False)
    differing: int
    of: int
    skipped: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False)

    @property
    def whole_for(self) -> list[str]:
        """The tools that load all of it, by their names in `dialects.READERS`."""
        return [name for name, left_out in self.skipped.items() if not left_out]

    def readers_sentence(self) -> str:
        """Which tools load all of it, and what others pass over, in words."""
        whole = [READERS[name] for name in self.whole_for]
        named = [f"{each.about} ({each.note})" if each.note else each.about for each in whole]
        parts = [f"whole for {', '.join(named)}" if named else "for programs that load weights by their names"]
        for name, left_out in self.skipped.items():
            if left_out:
                parts.append(f"{READERS[name].about} would pass over {len(left_out)} tensors, first {left_out[0]}")
        return "; ".join(parts)

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


@own_torch_settings()
def export(
    base: Base,
    terms: Iterable[Term],
    out: Path,
    format: str | None,
    about: About,
    *,
    for_: str | None = None,
    dtype: str = "float32",
    truncate: int | None = None,
    report: Progress = silent,
) -> Exported:
    """Write patches on a base as a new file of a format (`FORMATS`), whole or not at all.

    `for_` names the tool that is to load it (`dialects.READERS`): a format is chosen of which it loads everything, or the one
    that is named is refused if it would not. Without either, the format is kohya, of diffusion transformers diffusers.
    `dtype` is that of factors and differences; whole weights keep the base's. `truncate` lets changes that are not thin into
    a LoRA, cut to so many directions. Raises AlreadyExists when `out` is there, BadDelta when a patch does not fit,
    NotExportable when the format has no place for a change or the tool would pass over one.
    """
    out = Path(out).absolute()
    if not isinstance(dtype, str) or dtype not in STORED:
        raise NotExportable(f"values are stored as {', '.join(STORED)}; got {dtype!r}")
    if truncate is not None and (not isinstance(truncate, int) or truncate < 1):
        raise NotExportable(f"a change is cut to one direction or more; got {shown(truncate)}")
    if out.suffix != ".safetensors":
        raise NotExportable(f"an export is a safetensors file: let its name end in .safetensors, not {out.name}")
    refuse_taken(out)
    planned = plan(base, terms)
    if not planned.names:
        raise NotExportable("no patch changes any weight here, so there is nothing to export; add a patch first")
    format, pieces = _chosen(planned, format, for_, STORED[dtype], truncate)
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
        {
            name: each.skipped(base, format, planned.names)
            for name, each in READERS.items()
            if format in each.formats_of(base)
        },
    )


def _chosen(
    plan: CompositionPlan, format: str | None, for_: str | None, dtype: torch.dtype, truncate: int | None
) -> tuple[str, list[TensorExport]]:
    """The first format that holds all changes, and from which the tool that is named loads all of them."""
    tool = None if for_ is None else reader(for_)
    known = "diffusers" if plan.base.layout.is_caught else "kohya"
    formats = (format,) if format else tool.formats_of(plan.base) if tool else (known,)
    if tool and not formats:
        raise NotExportable(
            f"{tool.about} loads no LoRA that is written here for {plan.base.layout.name}; build a checkpoint"
        )
    refusals = []
    for each in formats:
        try:
            if tool:
                _refuse_unread(plan, each, tool)
            return each, place(plan, each, dtype, truncate)
        except NotExportable as refusal:
            refusals.append(refusal)
    raise refusals[0] if len(refusals) == 1 else NotExportable("; ".join(map(str, refusals)))


def _refuse_unread(plan: CompositionPlan, format: str, tool: Reader) -> None:
    formats = tool.formats_of(plan.base)
    if format in FORMATS and format not in formats:
        instead = f"export as {' or '.join(formats)}" if formats else "build a checkpoint"
        raise NotExportable(f"{tool.about} cannot load a {format} file of {plan.base.layout.name}; {instead}")
    if skipped := tool.skipped(plan.base, format, plan.names):
        whole = [
            n
            for n, each in READERS.items()
            if format in each.formats_of(plan.base) and not each.skipped(plan.base, format, skipped)
        ]
        raise NotExportable(
            f"{tool.about} would pass over {len(skipped)} of {len(plan.names)} changed tensors in a {format} file, first "
            f"{skipped[0]}; export for {' or '.join(whole)}, or build a checkpoint"
        )


def _arrays(pieces: list[TensorExport], made: dict[str, Stored], report: Progress) -> Iterator[Tensor]:
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


_DOWN = ".lora_A.weight"


def write_adapter(lora: Path, out: Path, base: str = "") -> dict[str, Any] | None:
    """Write `out` and return what belongs in `adapter_config.json`; None, and nothing, if more than one component is changed.

    A PEFT adapter is for one module, here the denoiser (`pipeline.unet` or `pipeline.transformer`). `base` is its name or
    its id on the Hub, for the config.
    """
    from safetensors.torch import load_file, save_file

    arrays = load_file(lora)
    components = {key.partition(".")[0] for key in arrays}
    if len(components) != 1 or not components <= {*DENOISERS}:
        return None
    prefix = f"{components.pop()}."
    # One text in the header, because safetensors writes several in an order of chance.
    save_file(
        {f"{PEFT_PREFIX}{key.removeprefix(prefix)}": array for key, array in arrays.items()}, out, {"format": "pt"}
    )
    ranks = {len(array) for key, array in arrays.items() if key.endswith(_DOWN)}
    assert len(ranks) == 1, "an export gives all layers one rank"
    rank = ranks.pop()
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(key.removeprefix(prefix).removesuffix(_DOWN) for key in arrays if key.endswith(_DOWN)),
    }
