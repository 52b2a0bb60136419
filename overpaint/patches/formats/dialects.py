"""The dialects of other tools' files: how each names a base's layers, which are read and in what order, and what each tool
passes over of the files that are written for it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.layout import single_file_of, transformer_names
from overpaint.core.errors import OverpaintError
from overpaint.core.names import checked_number

# The U-Net's modules as its first publication numbers them: `input_blocks`, `middle_block`, `output_blocks`.
#
# Layouts read checkpoints with these keys; here is the way back, for the tools that name a LoRA's layers so.


_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def ldm_modules(modules: Collection[str]) -> dict[str, str]:
    """The old name of each of a U-Net's modules, by diffusers' name (both without a component).

    All modules of the U-Net must be given: blocks are numbered through. What has no old name is left out.
    """
    blocks = [match for module in modules if (match := _BLOCK.fullmatch(module))]
    per_level = 2 + max((int(b[4]) for b in blocks if b[1] == "down" and b[3] == "resnets"), default=0)
    attended = {int(b[2]) for b in blocks if b[1] == "up" and b[3] == "attentions"}
    names = {module: _name(module, per_level, attended) for module in modules}
    return {module: name for module, name in names.items() if name is not None}


def _name(module: str, per_level: int, attended: set[int]) -> str | None:
    if module in _ENDS:
        return _ENDS[module]
    if found := _MIDDLE.fullmatch(module):
        part, number, rest = found[1], int(found[2]), found[3]
        return f"middle_block.{2 * number}.{_RESNET[rest]}" if part == "resnets" else f"middle_block.1.{rest}"
    found = _BLOCK.fullmatch(module)
    if found is None:
        return None
    side, block, part, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    if part == "downsamplers":
        return f"input_blocks.{per_level * (block + 1)}.0.op"
    if part == "upsamplers":
        return f"output_blocks.{per_level * (block + 1) - 1}.{1 + (block in attended)}.conv"
    at = per_level * block + layer + (side == "down")
    inner = f"0.{_RESNET[rest]}" if part == "resnets" else f"1.{rest}"
    return f"{'input' if side == 'down' else 'output'}_blocks.{at}.{inner}"


UNET, TRANSFORMERS = "unet", ("transformer", "transformer_2")
DENOISERS = (UNET, *TRANSFORMERS)
ENCODERS = ("text_encoder", "text_encoder_2")
INNER = "text_model."
"""What text encoders' names began with, and canonical names still do."""


def modules_of(base: Base) -> Mapping[str, tuple[str, ...]]:
    """The local names of each component's modules, sorted, by component."""
    names: dict[str, set[str]] = {}
    for name in base.names:
        component, _, local = name.partition("/")
        names.setdefault(component, set()).add(local.rpartition(".")[0])
    return {component: tuple(sorted(modules)) for component, modules in names.items()}


def split(name: str) -> tuple[str, str]:
    """A canonical tensor name as module and attribute: `unet/conv_in.weight` is `unet/conv_in` and `weight`."""
    module, _, attribute = name.rpartition(".")
    return module, attribute


def unet_modules(base: Base) -> Iterator[tuple[str, str]]:
    """Canonical and local name of every module of the U-Net."""
    return ((f"{UNET}/{local}", local) for local in modules_of(base).get(UNET, ()))


def ldm_unet_modules(base: Base) -> Iterator[tuple[str, str]]:
    """Canonical name and old local name of every module of the U-Net that has one."""
    return ((f"{UNET}/{local}", name) for local, name in ldm_modules(modules_of(base).get(UNET, ())).items())


def native_modules(base: Base, component: str) -> Iterator[tuple[str, str]]:
    """Canonical name and name in the model's own code of the modules of a diffusion transformer, as far as it is known.

    Without those that it keeps with others in one matrix, or with its rows in another order.
    """
    for modules, name in _named_by(base, component, "native"):
        if len(modules) == 1 and not _is_turned(base, modules[0]):
            yield modules[0], name


def native_stacks(base: Base, component: str, code: str = "native") -> Iterator[tuple[tuple[str, ...], str]]:
    """Canonical names, from the first row down, and name of what some code keeps in one matrix, or with its halves turned."""
    for modules, name in _named_by(base, component, code):
        if len(modules) > 1 or code != "native" or _is_turned(base, modules[0]):
            yield modules, name


def _named_by(base: Base, component: str, code: str) -> Iterator[tuple[tuple[str, ...], str]]:
    for modules, name in _code_names(base.layout.name, code, tuple(modules_of(base).get(component, ()))):
        yield tuple(f"{component}/{module}" for module in modules), name


@lru_cache(maxsize=8)  # asked a dozen times for a file, and it takes a tenth of a second on FLUX.1
def _code_names(layout: str, code: str, there: tuple[str, ...]) -> list[tuple[tuple[str, ...], str]]:
    """Modules, from the first row down, and their name in some code for the transformer of a layout, of those that are there."""
    rules, known = transformer_names(layout, code), {*there}
    named = rules.keys(f"{module}.weight" for module in there).items() if rules else ()
    found = [(tuple(split(name)[0] for name in names), split(key)[0]) for key, names in named]
    return [(modules, name) for modules, name in found if {*modules} <= known]


_TURNED = re.compile(r"transformer/(norm_out|transformer_blocks\.\d+\.norm1_context)\.linear")


def _is_turned(base: Base, module: str) -> bool:
    """Whether diffusers has first what scales and then what shifts, against the models' own code: the norm before an output.

    It is known by its width: other norms of these names give six vectors instead of two.
    """
    if not _TURNED.fullmatch(module):
        return False
    rows, columns = base.places[f"{module}.weight"].shape
    return rows == 2 * columns


def encoder_modules(base: Base, encoder: str) -> Iterator[tuple[str, str]]:
    """Canonical and local name of every module of a component: as it is, and without what newer libraries drop."""
    for local in modules_of(base).get(encoder, ()):
        yield f"{encoder}/{local}", local
        if local.startswith(INNER):
            yield f"{encoder}/{local}", local.removeprefix(INNER)


def lookup(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Canonical module by the name in a file, from pairs (canonical, name). A name that could mean two modules is left out."""
    modules: dict[str, str] = {}
    unsure = set()
    for module, name in pairs:
        if modules.setdefault(name, module) != module:
            unsure.add(name)
    return {name: module for name, module in modules.items() if name not in unsure}


WRAPPERS = re.compile(r"^(state_dict\.|module\.|_orig_mod\.)+|(?<=\.)(module|_orig_mod|base_model\.model)\.")
"""What tools of training put around a model, and with it into its names: DataParallel, torch.compile, PEFT."""
_NAMED_ADAPTER = re.compile(r"\.(lora_[AB])\.\w+\.weight$")


def unwrapped(key: str) -> str:
    """A key without what says nothing about the layer: wrappers, and the name that PEFT gave an adapter."""
    return _NAMED_ADAPTER.sub(r".\1.weight", WRAPPERS.sub("", key))


_PROJECTIONS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
_ENCODER_PROJECTIONS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


@dataclass(frozen=True)
class Root:
    """How names of a component's modules begin in some dialects. What follows is diffusers' name, or (`old`) the U-Net's as
    first published; with underscores for dots (`flat`); or also as attention processors were once named (`processors`). `code`
    is the one whose names of a transformer are meant by old ones."""

    prefix: str
    component: str
    dialects: tuple[str, ...]
    old: bool = False
    flat: bool = False
    processors: bool = False
    code: str = "native"

    def names(self, base: Base) -> Iterator[tuple[str, str]]:
        """Canonical module and name, for every module of the component."""
        for module, local in self._modules(base):
            yield module, self.prefix + (local.replace(".", "_") if self.flat else local)
            if self.processors:
                yield from ((module, self.prefix + name) for name in self._processor(local))

    def stacks(self, base: Base) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Name and canonical modules of every layer that is not one module's, row by row."""
        if self.old and self.component != UNET:
            for modules, local in native_stacks(base, self.component, self.code):
                yield self.prefix + (local.replace(".", "_") if self.flat else local), modules

    def _modules(self, base: Base) -> Iterator[tuple[str, str]]:
        if self.old:
            if self.code != "native":
                return iter(())
            return ldm_unet_modules(base) if self.component == UNET else native_modules(base, self.component)
        return encoder_modules(base, self.component)

    def _processor(self, local: str) -> Iterator[str]:
        if self.component in ENCODERS:
            parent, _, layer = local.rpartition(".")
            if layer in _ENCODER_PROJECTIONS:
                yield f"{parent}.{_ENCODER_PROJECTIONS[layer]}"
            return
        for layer, written in _PROJECTIONS.items():
            if local.endswith(f".{layer}"):
                block = local.removesuffix(layer)
                yield from (f"{block}processor.{written}", f"{block}{written}")


_KOHYA, _DIFFUSERS, _PEFT = ("kohya LoRA",), ("diffusers LoRA",), ("PEFT adapter",)
_PROCESSORS, _XLABS, _WEIGHTS = ("diffusers attention processors",), ("XLabs LoRA",), ("edited weights",)
_COMFY = ("ComfyUI LoRA", *_WEIGHTS)

ROOTS: tuple[Root, ...] = (
    *(Root(prefix, UNET, _KOHYA, flat=True) for prefix in ("lora_unet_", "lycoris_")),
    Root("lora_unet_", UNET, _KOHYA, old=True, flat=True),
    *(Root(prefix, ENCODERS[0], _KOHYA, flat=True) for prefix in ("lora_te_", "lora_te1_")),
    Root("lora_te2_", ENCODERS[1], _KOHYA, flat=True),
    Root("unet.", UNET, (*_DIFFUSERS, *_WEIGHTS), processors=True),
    Root("", UNET, (*_PROCESSORS, *_WEIGHTS), processors=True),
    *(Root(f"{encoder}.", encoder, (*_DIFFUSERS, *_WEIGHTS), processors=True) for encoder in ENCODERS),
    *(Root("base_model.model.", component, _PEFT) for component in (UNET, *ENCODERS)),
    *(Root(prefix, UNET, _COMFY, old=True) for prefix in ("diffusion_model.", "model.diffusion_model.")),
    *(
        Root(f"{start}{name}.transformer.", encoder, _COMFY)
        for encoder, names in ((ENCODERS[0], ("clip_l", "clip_h")), (ENCODERS[1], ("clip_g",)))
        for name in names
        for start in ("text_encoders.", "")
    ),
    *(
        Root(prefix, ENCODERS[0], _WEIGHTS)
        for prefix in ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
    ),
    *(Root("", encoder, _WEIGHTS) for encoder in ENCODERS),
    Root("vae.", "vae", _WEIGHTS),
    Root("lora_transformer_", TRANSFORMERS[0], _KOHYA, flat=True),
    Root("lora_unet_", TRANSFORMERS[0], _KOHYA, old=True, flat=True),
    *(Root(f"{part}.", part, (*_DIFFUSERS, *_WEIGHTS)) for part in TRANSFORMERS),
    Root("base_model.model.", TRANSFORMERS[0], _PEFT),
    Root("", TRANSFORMERS[0], (*_PROCESSORS, *_WEIGHTS)),
    *(Root(prefix, TRANSFORMERS[0], _COMFY, old=True) for prefix in ("diffusion_model.", "model.diffusion_model.")),
    *(Root(prefix, TRANSFORMERS[0], _XLABS, old=True, code="xlabs") for prefix in ("", "diffusion_model.")),
)
"""All of them. A name that could mean two modules means none."""


# A dialect: how one family of tools names layers and what the tensors in its files mean.
#
# A key is a module's name and an ending. The ending says what role a tensor has in the change of one of the module's
# parameters; the name is looked up among those the dialect gives the base's own modules. A file is of the dialect that
# explains most of its keys.


Role = Literal["down", "up", "mid", "alpha", "difference", "value"]
Endings = Mapping[str, tuple[Role, str]]
"""What a key's ending means: the tensor's role, and the attribute of the module that it is about."""


class ForeignFile(OverpaintError):
    """A file of another tool that cannot be imported: unknown, unsafe, for another base, or of a kind no patch can hold."""


@dataclass(frozen=True)
class Dialect:
    """One dialect: its name, and what its endings mean. `ROOTS` has how it begins the names of a base's modules."""

    name: str
    endings: Endings

    def module_names(self, base: Base) -> dict[str, str]:
        """Canonical module by the name that this dialect has for it."""
        return lookup(pair for root in ROOTS if self.name in root.dialects for pair in root.names(base))

    def read(self, base: Base, keys: Collection[str]) -> FileReading:
        """What the keys of a file mean in this dialect."""
        modules, endings = self.module_names(base), sorted(self.endings, key=len, reverse=True)
        stacks = {name: found for root in ROOTS if self.name in root.dialects for name, found in root.stacks(base)}
        parts: dict[str, dict[Role, str]] = {}
        rows: dict[str, Rows] = {}
        unmatched, layers = [], set()
        for key in keys:
            name = unwrapped(key)
            ending = next((each for each in endings if name.endswith(each)), "")
            layer = name.removesuffix(ending)
            role, attribute = self.endings.get(ending, ("value", ""))
            alone = {f"{modules[layer]}.{attribute}": None} if layer in modules else {}
            tensors = alone or _rows_of_stack(base, [f"{module}.{attribute}" for module in stacks.get(layer, ())])
            if not ending or not tensors:
                unmatched.append(key)
                continue
            for tensor, own_rows in tensors.items():
                roles = parts.setdefault(tensor, {})
                if role in roles or (roles and rows.get(tensor) != own_rows) or _two_ways({role, *roles}):
                    other = roles.get(role) or next(iter(roles.values()))
                    raise ForeignFile(f"{other} and {key} are about the same layer; take away the one not meant")
                roles[role] = key
                if own_rows is not None:
                    rows[tensor] = own_rows
            layers.add(layer)
        partly = tuple(key for key in unmatched if any(parent in layers for parent in _parents(unwrapped(key))))
        return FileReading(self, parts, tuple(unmatched), len(keys) - len(unmatched), partly, rows)


def _two_ways(roles: Collection[Role]) -> bool:
    """Whether a weight is changed by factors and also otherwise, of which tools make different things."""
    return not {"difference", "value"}.isdisjoint(roles) and not {"up", "down", "mid"}.isdisjoint(roles)


@dataclass(frozen=True)
class Rows:
    """Which rows of a matrix of `whole` rows are those of one tensor: these ranges, one after the other."""

    whole: int
    ranges: tuple[tuple[int, int], ...]

    def of(self, values: Tensor) -> Tensor:
        """The tensor's rows."""
        return torch.cat([values[start:stop] for start, stop in self.ranges])


def _rows_of_stack(base: Base, names: Sequence[str]) -> dict[str, Rows | None]:
    """By tensor, its rows in a matrix that has those of all of them; nothing where the base lacks one of them."""
    if not {*names} <= base.places.keys():
        return {}
    ends = [0, *accumulate(base.places[name].shape[0] for name in names)]
    if len(names) == 1 and _is_turned(base, split(names[0])[0]):
        return {names[0]: Rows(ends[1], ((ends[1] // 2, ends[1]), (0, ends[1] // 2)))}
    return {name: Rows(ends[-1], (place,)) for name, place in zip(names, pairwise(ends), strict=True)}


@dataclass(frozen=True)
class FileReading:
    """A file's keys explained: by canonical tensor name, the key in each role; and the keys left over.

    `rows` has the tensors of which the file's matrices have more, or in another order.

    `partly` are those of the keys left over that belong to a layer of which other keys were explained: without them nobody
    knows what the layer does.
    """

    dialect: Dialect
    parts: Mapping[str, Mapping[Role, str]] = field(repr=False)
    unmatched: tuple[str, ...]
    matched: int
    partly: tuple[str, ...] = ()
    rows: Mapping[str, Rows] = field(default_factory=dict, repr=False)


def _parents(key: str) -> Iterator[str]:
    """`a.b.c` to `a.b` and `a`."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


UNREAD: Mapping[str, tuple[str, ...]] = {
    "DoRA": ("dora_scale", "lora_magnitude_vector"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "OFT or BOFT": ("oft_blocks", "oft_diag"),
    "OFT": ("oft_r", "oft_s", "oft_R.weight"),
    "BOFT": ("boft_R", "boft_s"),
    "GLoRA": ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
    "IA3": ("on_input", "ia3_l"),
    "VeRA": ("vera_lambda_b", "vera_lambda_d"),
    "AdaLoRA": ("lora_E", "ranknum"),
    "FourierFT": ("fourierft_spectrum",),
    "HRA": ("hra_u",),
    "ComfyUI's set_weight": ("set_weight",),
    "ComfyUI's reshape_weight": ("reshape_weight",),
}
"""What is known and yet not read, by what its keys end in."""

_ALGORITHMS = {ending: algorithm for algorithm, endings in UNREAD.items() for ending in endings}
_UNREAD_KEY = re.compile(
    # Whoever wrote the file may have put the adapter's name, and `weight`, behind the word.
    rf"[._](?P<word>{'|'.join(map(re.escape, sorted(_ALGORITHMS, key=len, reverse=True)))})(\.\w+)?(\.weight)?$"
)


def detect(dialects: Sequence[Dialect], base: Base, keys: Collection[str]) -> FileReading:
    """The reading that explains most keys; the earlier dialect of two that explain as many.

    Raises ForeignFile when none explains any, or for an algorithm whose change is not read.
    """
    for key in keys:
        if unread := _UNREAD_KEY.search(key):
            algorithm = _ALGORITHMS[unread["word"]]
            raise ForeignFile(
                f"{_short(key)} is a tensor as {algorithm} names them, and {algorithm} is not read; merge the file into a "
                "checkpoint with the tool it comes from, and import the checkpoint"
            )
    best = max((dialect.read(base, keys) for dialect in dialects), key=lambda reading: reading.matched)
    if not best.matched:
        raise ForeignFile(f"none of its {len(keys)} keys names a layer of the base at {base.path}: {_described(keys)}")
    if best.partly:
        raise ForeignFile(
            f"{_short(best.partly[0])} belongs to a layer that is read as {best.dialect.name}, and is not read itself; without "
            "it the layer would mean something else: merge the file with the tool it comes from, and import the checkpoint"
        )
    return best


KINDS: Mapping[str, tuple[str, ...]] = {
    "a ControlNet or T2I-Adapter": ("control_model.", "controlnet_", "control_", "adapter.body."),
    "an IP-Adapter": ("image_proj", "ip_adapter"),
    "a textual inversion": ("emb_params", "string_to_param", "<"),
    "a text encoder by OpenCLIP's names, which are read in whole checkpoints alone": (
        "transformer.resblocks.",
        "cond_stage_model.model.",
        "conditioner.embedders.1.model.",
    ),
    "a VAE": ("first_stage_model.", "encoder.down", "decoder.up", "vae."),
    "XLabs' LoRA of FLUX, whose layers are named by attention processors": (
        "double_blocks.0.processor",
        "single_blocks.0.processor",
    ),
    "a LoRA or weights of FLUX": ("double_blocks.", "single_blocks.", "lora_unet_double_blocks_", "lora_unet_single_"),
    "a LoRA or weights of Stable Diffusion 3": ("joint_blocks.", "lora_unet_joint_blocks_"),
    "a LoRA or weights of a diffusion transformer": (
        "transformer.",
        "lora_transformer_",
        "transformer_blocks.",
        "blocks.",
    ),
}
"""What a file may be that names no layer of a base, by how its keys begin behind `WRAPPERS` and the U-Net's prefixes."""


def _described(keys: Collection[str]) -> str:
    """What keys of which none was understood look like, as far as their prefixes show."""
    if not keys:
        return "it has none"
    example = min(keys)
    bare = [unwrapped(key).removeprefix("model.").removeprefix("diffusion_model.") for key in keys]
    for kind, beginnings in KINDS.items():
        if any(key.startswith(beginnings) for key in bare):
            return f"by keys such as {_short(example)} it is {kind}; it cannot be imported for this base"
    known = sorted({root.prefix for root in ROOTS if root.prefix}, key=len, reverse=True)
    if prefix := next((each for each in known if any(unwrapped(key).startswith(each) for key in keys)), None):
        return (
            f"keys such as {_short(example)} begin as known tools write them ({prefix}), but this base has no such layers; name "
            "the base that it was made for"
        )
    return f"no tool that is known here names tensors as {_short(example)}; convert it with the tool it comes from"


def _short(key: str) -> str:
    return repr(key if len(key) <= 100 else f"{key[:80]}...")


# The LoRA files of diffusers, today's (`unet.….to_k.lora_A.weight`) and its older ones, and PEFT's adapters.
#
# Today's header or `adapter_config.json` may say by how much the factors count; `AdapterConfig` reads it. Older files name
# the attention processor instead of the layer (`….attn2.processor.to_k_lora.down.weight`).


HEADER = "lora_adapter_metadata"
PEFT_PREFIX = "base_model.model."

DIFFUSERS_ENDINGS: Endings = {
    ".lora_A.weight": ("down", "weight"),
    ".lora_B.weight": ("up", "weight"),
    ".lora.down.weight": ("down", "weight"),
    ".lora.up.weight": ("up", "weight"),
    ".lora_linear_layer.down.weight": ("down", "weight"),
    ".lora_linear_layer.up.weight": ("up", "weight"),
    "_lora.down.weight": ("down", "weight"),
    "_lora.up.weight": ("up", "weight"),
    ".alpha": ("alpha", "weight"),
}


def diffusers_written(base: Base) -> dict[str, str]:
    """The name under which diffusers finds a module, by canonical module."""
    names = {f"{part}/{local}": f"{part}.{local}" for part in DENOISERS for local in modules_of(base).get(part, ())}
    for encoder in ENCODERS:
        names.update({module: module.replace("/", ".", 1) for module, _ in encoder_modules(base, encoder)})
    return names


DIFFUSERS = Dialect("diffusers LoRA", DIFFUSERS_ENDINGS)
PROCESSORS = Dialect("diffusers attention processors", DIFFUSERS_ENDINGS)
PEFT = Dialect("PEFT adapter", DIFFUSERS_ENDINGS)

INITIALISATIONS = ("true", "false", "gaussian", "orthogonal", "eva", "mica")
"""Values of PEFT's `init_lora_weights` that leave the base's weights as they are. PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change
them before training, so that their factors are differences from a base that nobody has."""

LORA_SETTINGS: Mapping[str, str] = {
    **dict.fromkeys(("peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights"), "read"),
    **dict.fromkeys(("r", "rank_pattern"), "the factors' shapes say it"),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"), "the keys say it"),
    **dict.fromkeys(
        ("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "parent_library"),
        "describes",
    ),
    **dict.fromkeys(
        ("lora_dropout", "inference_mode", "runtime_config", "ensure_weight_tying"), "concerns training alone"
    ),
    **dict.fromkeys(
        ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
        "details a setting that is judged by itself",
    ),
}
"""The settings of PEFT's LoraConfig with which a file means what a plain LoRA means, and why. Any other has to be off."""


@dataclass(frozen=True)
class AdapterConfig:
    """By how much the factors of an adapter count: its alpha over the rank, unless a pattern names a module."""

    alpha: float
    alphas: Mapping[str, float] = field(default_factory=dict)
    by_root: bool = False

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> AdapterConfig:
        """Of a LoraConfig. Raises ForeignFile for what it asks for beyond a plain LoRA."""
        kind = raw.get("peft_type", "LORA")
        if kind != "LORA":
            raise ForeignFile(f"its configuration is of a {kind} adapter; only LORA is read")
        if asked := [name for name, value in raw.items() if name not in LORA_SETTINGS and value and value != "none"]:
            raise ForeignFile(
                f"its configuration asks for {', '.join(map(str, asked))}, which is not read; merge it first"
            )
        initialised = raw.get("init_lora_weights", True)
        if initialised is not None and str(initialised).lower() not in INITIALISATIONS:
            raise ForeignFile(
                f"its configuration has init_lora_weights={str(initialised)[:80]!r}, which changes the base's weights before "
                "training; convert the adapter to a plain LoRA, or merge it into a checkpoint and import that"
            )
        pattern, by_root = raw.get("alpha_pattern") or {}, raw.get("use_rslora", False)
        if not isinstance(pattern, Mapping) or by_root not in (True, False, None):
            raise ForeignFile(
                "its alpha_pattern is no map, or its use_rslora neither true nor false; get the file again"
            )
        try:
            alphas = {str(name): checked_number(alpha, f"alpha_pattern of {name}") for name, alpha in pattern.items()}
            config = cls(checked_number(raw.get("lora_alpha", "nothing"), "lora_alpha"), alphas, bool(by_root))
        except OverpaintError as error:
            raise ForeignFile(f"its configuration is not that of a LoRA: {error}; get the file again") from error
        if unclear := [name for name in alphas if not re.fullmatch(r"\^?[\w.]+", name)]:
            raise ForeignFile(f"its alpha_pattern {unclear[0][:80]!r} is more than a module's name, which is not read")
        return config

    def scale(self, module: str, rank: int) -> float:
        """What the product of a module's factors is multiplied by. `module` is the file's name of it, without a component."""
        alpha = self.alpha
        for name, other in self.alphas.items():
            if module == name.removeprefix("^") or (name[0] != "^" and module.endswith(f".{name}")):
                alpha = other
                break
        return alpha / (rank**0.5 if self.by_root else rank)


def written_module(key: str, component: str) -> str:
    """The module that a key of an adapter is about, as its file names it, without a component: what patterns are held against."""
    name = unwrapped(key).removeprefix(PEFT_PREFIX).removeprefix(f"{component}.")
    endings = sorted((ending for ending in DIFFUSERS_ENDINGS if name.endswith(ending)), key=len)
    return name.removesuffix(endings[-1]) if endings else name


def configs_of(metadata: Mapping[str, str]) -> dict[str, AdapterConfig]:
    """The configuration of each component's adapter, as diffusers writes them into a file's header; most have none."""
    if HEADER not in metadata:
        return {}
    try:
        flat = json.loads(metadata[HEADER])
        by_component: dict[str, dict[str, Any]] = {}
        for name, value in flat.items():
            # Of one model's adapter (`save_lora_adapter`) there is no component.
            component, _, setting = name.rpartition(".")
            by_component.setdefault(component, {})[setting] = value
    except (ValueError, AttributeError, RecursionError) as error:
        raise ForeignFile(f"its header's {HEADER} is not JSON ({error}); get the file again") from error
    return {component: AdapterConfig.from_json(raw) for component, raw in by_component.items()}


# kohya's LoRA files, the only LoRA that diffusers, ComfyUI, A1111 and sd-scripts all read; and LyCORIS's full differences.
#
# Layers are named with underscores: `lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k`. SPM, LECO and
# concept sliders write the same, ComfyUI and A1111 read the differences too.


KOHYA_ENDINGS: Endings = {
    ".lora_down.weight": ("down", "weight"),
    ".lora_up.weight": ("up", "weight"),
    ".lora_mid.weight": ("mid", "weight"),
    ".alpha": ("alpha", "weight"),
    ".diff": ("difference", "weight"),
    ".diff_b": ("difference", "bias"),
    ".w_norm": ("difference", "weight"),
    ".b_norm": ("difference", "bias"),
}


def kohya_written(base: Base) -> dict[str, str]:
    """The name under which every reader finds a module, by canonical module.

    For SDXL, trained on the U-Net as first published, the old names of its modules; diffusers' for SD 1.x and 2.x. No denoiser
    of another architecture has names that every reader knows.
    """
    is_xl = ENCODERS[1] in base.layout.components
    unet = ldm_unet_modules(base) if is_xl else unet_modules(base)
    names = {module: _underscored("lora_unet", local) for module, local in unet if not base.layout.is_caught}
    if f"{UNET}/conv_norm_out" in names:
        names[f"{UNET}/conv_norm_out"] = "lora_unet_out_0"  # A1111 knows diffusers' names of all layers but this one
    prefixes = {ENCODERS[0]: "lora_te1" if is_xl else "lora_te", ENCODERS[1]: "lora_te2"}
    for encoder, prefix in prefixes.items():
        for module, _ in encoder_modules(base, encoder):
            names[module] = _underscored(prefix, module.partition("/")[2])
    return names


def _underscored(prefix: str, local: str) -> str:
    return f"{prefix}_{local.replace('.', '_')}"


KOHYA = Dialect("kohya LoRA", KOHYA_ENDINGS)


# ComfyUI's own keys of LoRA and full differences: the names that weights have in its memory.
#
# `diffusion_model.input_blocks.1.1.….attn2.to_k.diff`, `text_encoders.clip_l.transformer.text_model.….fc1.lora_up.weight`.


COMFY = Dialect("ComfyUI LoRA", {**KOHYA_ENDINGS, **DIFFUSERS_ENDINGS})


# Edited weights themselves, as most erasers save them: ESD, UCE, Concept Ablation, whole U-Nets, whole state dicts.
#
# Names are diffusers' (a U-Net's without any prefix) or those of the first publication.


WEIGHTS_ENDINGS: Endings = {".weight": ("value", "weight"), ".bias": ("value", "bias")}


def weights_written(base: Base) -> dict[str, str]:
    """The name that erasers give a module, by canonical module: a U-Net's own, another component's with its prefix."""
    return {
        f"{component}/{local}": local if component == "unet" else f"{component}.{local}"
        for component, modules in modules_of(base).items()
        for local in modules
    }


WEIGHTS = Dialect("edited weights", WEIGHTS_ENDINGS)


# XLabs' LoRA files of FLUX: a block's attention processor has factors for q, k and v at once, and for what follows them.


XLABS = Dialect("XLabs LoRA", {".down.weight": ("down", "weight"), ".up.weight": ("up", "weight")})


DIALECTS: tuple[Dialect, ...] = (KOHYA, DIFFUSERS, PEFT, PROCESSORS, COMFY, XLABS, WEIGHTS)


@dataclass(frozen=True)
class Reader:
    """A tool: its name, what it is called, the formats that it reads of SD 1.x, 2.x and XL, the best first, and what it makes of
    them.

    Of other architectures it reads those whose layout says so (`read_by`), and the diffusers format alone: kohya's names of text
    inputs load nothing in diffusers.
    `skips` has, by format, patterns of the canonical names that it passes over; encoders that the tool builds by OpenCLIP
    are called `open_clip` there, and a U-Net that reads a picture and a mask beside the noise, `inpainting`. `note` is what else
    is to be known of it.
    """

    name: str
    about: str
    formats: tuple[str, ...]
    skips: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    note: str = ""

    def formats_of(self, base: Base) -> tuple[str, ...]:
        """The formats that it reads for a base's architecture."""
        if not base.layout.is_caught:
            return self.formats
        return ("diffusers",) if self.name in base.layout.read_by else ()

    def skipped(self, base: Base, format: str, names: Iterable[str]) -> list[str]:
        """The tensors of a file of a format that it reads, by canonical name, that it passes over."""
        called = dict.fromkeys(open_clip_encoders(base), "open_clip")
        first = base.places.get(f"{UNET}/conv_in.weight")
        if first is not None and first.shape[1] == INPAINTING:
            called[UNET] = "inpainting"
        skipped = []
        for name in names:
            component, _, local = name.partition("/")
            known = {name, f"{called.get(component, component)}/{local}"}
            if any(fnmatchcase(each, pattern) for each in known for pattern in self.skips.get(format, ())):
                skipped.append(name)
        return skipped


INPAINTING = 9
"""Channels that the U-Net of an inpainting model reads: the noised latents, a mask, and the latents of the picture."""

# Facts about the tools' own loaders: A1111 1.10, sd-scripts 48d368f, ComfyUI 17358c8, diffusers 0.42. A tool that passes over
# a layer leaves there what was to be erased, so an export says for whom it is whole, and is refused for whom it is not.
_TOOLS = (
    Reader(
        "a1111",
        "A1111",
        ("kohya", "comfy-diff"),
        # It adds to the four matrices of an attention at once, and to the bias of the last alone. Of a first convolution with
        # nine input channels it assumes that the change has four, pads it to fourteen, and then cannot add it.
        {
            "kohya": ("inpainting/conv_in.*",),
            "comfy-diff": ("inpainting/conv_in.*", "open_clip/*.self_attn.[qkv]_proj.bias"),
        },
        "adds in the precision of the weights: in half precision off by about 1e-3 of the change",
    ),
    Reader(
        "kohya",
        "kohya's scripts",
        ("kohya",),
        # It looks inside of transformers, residual blocks and samplers.
        {"kohya": ("unet/conv_in.*", "unet/conv_out.*", "unet/time_embedding.*", "unet/add_embedding.*")},
    ),
    Reader("comfyui", "ComfyUI and Forge", ("kohya", "comfy-diff")),
    Reader("diffusers", "diffusers", ("diffusers", "kohya")),
)
READERS: Mapping[str, Reader] = {tool.name: tool for tool in _TOOLS}
"""The tools that an export can be for, by the name that `--for` has for each."""


def reader(name: str) -> Reader:
    """A tool by its name. Raises OverpaintError for one that is not known."""
    if name not in READERS:
        raise OverpaintError(f"unknown tool {name!r}; an export can be for {', '.join(READERS)}")
    return READERS[name]


def open_clip_encoders(base: Base) -> list[str]:
    """The text encoders that tools with the first publications' code build by OpenCLIP, with q, k and v in one matrix."""
    form = single_file_of(base.layout.single_files, base.names)
    return (
        []
        if form is None
        else [encoder for encoder in ENCODERS if (keys := form.mappings.get(encoder)) and keys.blocks]
    )
