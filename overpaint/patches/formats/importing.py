"""Import: a file of another tool becomes a delta, and what that delta does is compared with what the file says.

The file may hold changes (LoRA factors, differences) or edited weights. Weights that were rounded more coarsely than the
base is stored are compared with the base rounded alike, so that the patch holds the edit and not the rounding.

Nothing in a file is believed or run: safetensors are read as every container here is, pickles through
`torch.load(weights_only=True)` and mapped into memory; keys stay names and never become paths.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.checkpoint import refuse_lone_shard, weight_files, weight_variants
from overpaint.bases.layout import UnknownLayout
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.safetensors_file import (
    DTYPES,
    FLOATS,
    PICKLE_SUFFIXES,
    BrokenFile,
    PickledCheckpoint,
    SafetensorsFile,
    check_plain,
    dtype_name,
)
from overpaint.core.errors import NotFound
from overpaint.core.names import typed_path
from overpaint.core.reporting import Progress, silent
from overpaint.patches.arithmetic import Fitted, fit_edit, is_zero
from overpaint.patches.compose import Term, plan
from overpaint.patches.delta import Delta, Dense, LowRank, Sum, Xor, all_finite, identical, residual
from overpaint.patches.formats.dialects import (
    DIALECTS,
    PEFT_PREFIX,
    AdapterConfig,
    FileReading,
    ForeignFile,
    Role,
    Rows,
    configs_of,
    detect,
    written_module,
)

PICKLES = (*PICKLE_SUFFIXES, ".bin")
ADAPTER, CONFIG = ("adapter_model.safetensors", "adapter_model.bin"), "adapter_config.json"
_STEMS = ("pytorch_lora_weights", "diffusion_pytorch_model", "model")
"""What the names of a model's weights begin with, in a folder that holds one model."""
_PICKLED_LORA = "pytorch_lora_weights.bin"
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_ADAPTER_CONFIG_LIMIT = 1 << 20
_SCALES = frozenset(("alpha", "lora_alpha", "network_alpha", "lora_scale", "scale"))
"""Words in a header by which some programs say how much factors count, and which others pass over."""


@dataclass(frozen=True)
class ForeignWeights:
    """An opened file: dtype and shape by key, the texts of its header, and what an adapter's configuration says.

    `configs` has it by component, or under "" where it is about whatever component the keys name. `settings` names what the file
    holds beside its tensors and may be about how much they count.
    """

    path: Path
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = field(repr=False)
    metadata: Mapping[str, str]
    configs: Mapping[str, AdapterConfig]
    _tensor: Callable[[str], Tensor] = field(repr=False)
    settings: tuple[str, ...] = ()

    def tensor(self, key: str) -> Tensor:
        """One tensor; float8 is widened to float32, which holds it exactly.

        Raises ForeignFile unless it is of floating point and all its values are finite.
        """
        dtype = self.shapes[key][0]
        if dtype not in (*FLOATS, *FP8):
            raise ForeignFile(
                f"{self.path.name}: {key[:100]} is {dtype_name(dtype)}; what changes a weight is float8, float16, bfloat16, "
                "float32 or float64: convert the file first"
            )
        values = self._tensor(key)
        if dtype in FP8:
            values = values.to(torch.float32)
        if not all_finite(values):
            raise ForeignFile(
                f"{self.path.name}: {key[:100]} has values that are not finite; nothing can be made of it"
            )
        return values

    def number(self, key: str) -> float:
        """A tensor of one real number, of whatever dtype. Raises ForeignFile for any other."""
        values = self._tensor(key)
        if values.numel() != 1 or values.dtype in (torch.bool, torch.complex64, torch.complex128):
            raise ForeignFile(
                f"{self.path.name}: {key[:100]} is {dtype_name(values.dtype)} of shape {list(values.shape)} instead of one real "
                "number; get the file again"
            )
        number = float(values)
        if not math.isfinite(number):
            raise ForeignFile(f"{self.path.name}: {key[:100]} is {number}, not finite; nothing can be made of it")
        return number


def open_weights(path: Path) -> ForeignWeights:
    """Open a file, or the weights in an adapter's or a model's folder.

    An adapter's weights are read with the configuration beside them, whether the folder is named or the file in it.
    Raises BrokenFile for a file that is damaged or would have to run a program, ForeignFile for one of another kind, or for
    an adapter without its configuration.
    """
    if path.is_dir():
        return _of_folder(path)
    if path.name.endswith(".json"):
        return _of_weight_files(path, "")
    refuse_lone_shard(path)
    weights = _of_file(path)
    return replace(weights, configs={"": _config(path.with_name(CONFIG))}) if path.name in ADAPTER else weights


def _of_file(path: Path) -> ForeignWeights:
    if path.suffix in PICKLES:
        return _of_pickle(path)
    if path.suffix != ".safetensors":
        raise ForeignFile(
            f"{path.name} is none of the files known here: .safetensors, {', '.join(PICKLES)}, or a folder"
        )
    container = SafetensorsFile.open(path)
    weights = _of_container(container, configs_of(container.metadata))
    return replace(weights, settings=tuple(sorted(_SCALES & container.metadata.keys())))


def _of_folder(folder: Path) -> ForeignWeights:
    """An adapter's, a LoRA's or one model's folder: weights in one file or in shards, plain or of one variant."""
    adapter = next((folder / name for name in ADAPTER if (folder / name).is_file()), None)
    if adapter is not None:
        return replace(open_weights(adapter), path=folder)
    names = [entry.name for entry in folder.iterdir()]
    stems = [stem for stem in _STEMS if weight_variants(names, stem)]
    if len(stems) == 1:
        return _of_weight_files(folder, stems[0])
    if not stems and _PICKLED_LORA in names:
        return replace(_of_pickle(folder / _PICKLED_LORA), path=folder)
    raise ForeignFile(
        f"{folder} is no folder of a pipeline, of an adapter ({ADAPTER[0]} with {CONFIG}) or of one model "
        f"({', '.join(f'{stem}.safetensors' for stem in _STEMS)}); name one of these"
    )


def _of_weight_files(source: Path, stem: str) -> ForeignWeights:
    """All weights of one model, which may lie in several files."""
    _, files = weight_files(source, stem)
    if len(files) == 1:
        return replace(open_weights(files[0]), path=source)
    parts = [_of_file(file) for file in files]
    owner = {key: part for part in parts for key in part.shapes}
    if len(owner) != sum(len(part.shapes) for part in parts):
        raise ForeignFile(f"{source} has a tensor in two of its files; get it again")
    shapes = {key: part.shapes[key] for key, part in owner.items()}
    configs = {component: config for part in parts for component, config in part.configs.items()}
    return ForeignWeights(source, shapes, parts[0].metadata, configs, lambda key: owner[key]._tensor(key))


def _config(file: Path) -> AdapterConfig:
    try:
        if file.stat().st_size > _ADAPTER_CONFIG_LIMIT:
            raise ForeignFile(f"{file} is larger than any configuration; get the adapter again")
        raw = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ForeignFile(
            f"{file} cannot be read ({error}); without it nobody knows how much the adapter counts"
        ) from error
    if not isinstance(raw, dict):
        raise ForeignFile(f"{file} is not the configuration of an adapter; get it again")
    return AdapterConfig.from_json(raw)


def _of_container(container: SafetensorsFile, configs: Mapping[str, AdapterConfig]) -> ForeignWeights:
    shapes = {key: (DTYPES[entry.dtype], entry.shape) for key, entry in container.entries.items()}
    return ForeignWeights(container.path, shapes, container.metadata, configs, container.tensor)


_COUNTERS = (
    *("epoch", "step", "global_step", "iteration", "pytorch-lightning_version", "callbacks", "loops"),
    *("optimizer", "optimizer_states", "scaler", "lr_scheduler", "lr_schedulers", "scheduler"),
)
"""What programs of training keep beside tensors, and what does not change their meaning."""


@own_torch_settings()
def _of_pickle(path: Path) -> ForeignWeights:
    """A state dict, or a map of them such as `{"unet": {...}, "text_encoder": {...}}`, by dotted key.

    A number that is an alpha is one whether it is a tensor or not.
    """
    PickledCheckpoint.open(path)  # so that it is no bomb, and builds nothing but tensors
    values: dict[str, Tensor] = {}
    settings = []
    for key, value in _leaves(torch.load(path, map_location="cpu", weights_only=True, mmap=True)):
        if isinstance(value, int | float) and key.endswith(".alpha"):
            value = torch.tensor(float(value), dtype=torch.float64)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            settings.append(key)
        elif key in values:
            raise BrokenFile(f"{path} holds {key[:80]!r} twice; take away the one that is not meant")
        else:
            check_plain(path, key, value)
            values[key] = value
    shapes = {key: (value.dtype, tuple(value.shape)) for key, value in values.items()}
    others = tuple(key for key in settings if key.partition(".")[0] not in _COUNTERS)
    return ForeignWeights(path, shapes, {}, {}, lambda key: values[key].detach().clone(), others)


def _leaves(loaded: object) -> Iterator[tuple[str, object]]:
    """What a pickled map holds, and what the maps in it hold, by dotted key; `state_dict` is no part of a name."""
    for name, part in loaded.items() if isinstance(loaded, dict) else ():
        if isinstance(part, dict):
            yield from ((str(key) if name == "state_dict" else f"{name}.{key}", value) for key, value in part.items())
        else:
            yield str(name), part


Pair = tuple[Tensor, Tensor]
"""up (out x r) and down (r x in)."""


def factors(
    weights: ForeignWeights, name: str, keys: Mapping[Role, str], shape: tuple[int, ...], rows: Rows | None = None
) -> Pair | None:
    """The factors of one weight of a shape, None where their product is zero; `rows` are its own of what the file has.

    A convolution's kernel counts as the matrix out x (in h w). Alpha over rank, or what a configuration says, is folded
    into `up`; where a file says neither, the factors count as they are. Raises ForeignFile when they do not fit.
    """
    shapes = {role: weights.shapes[key][1] for role, key in keys.items()}
    shape = _whole(shape, rows)
    if missing := {"up", "down"} - keys.keys():
        raise ForeignFile(
            f"{weights.path.name} has {next(iter(keys.values()))} without the factor {missing.pop()!r}; it is incomplete: get "
            "it again"
        )
    if not _multiply(shapes, shape):
        found = " and ".join(str(list(shapes[role])) for role in ("up", "mid", "down") if role in shapes)
        raise ForeignFile(
            f"{weights.path.name} has factors {found} for {_with_others(name, rows)}, which has shape {list(shape)} here; it was "
            "made for another base"
        )
    up, down = (weights.tensor(keys[role]) for role in ("up", "down"))
    if "mid" in keys:
        down = _with_core(weights.tensor(keys["mid"]), down)
    matrix = down.reshape(shapes["up"][1], -1)
    scale = _scale(weights, name, keys, shapes["down"][0])
    matrix_up = _held(up.reshape(shape[0], -1).double() * scale, up.dtype)
    return _trimmed(matrix_up if rows is None else rows.of(matrix_up), matrix)


def _trimmed(up: Tensor, down: Tensor) -> Pair | None:
    """The factors without directions that are zero, as padding is; None when no other is there."""
    used = (up != 0).any(0) & (down != 0).any(1)
    if bool(used.all()):
        return up, down
    return (up[:, used], down[used]) if bool(used.any()) else None


def _whole(shape: tuple[int, ...], rows: Rows | None) -> tuple[int, ...]:
    """The shape of what a file has where a tensor of a shape is some rows of it."""
    return tuple(shape) if rows is None else (rows.whole, *shape[1:])


def _with_others(name: str, rows: Rows | None) -> str:
    return name if rows is None else f"{name} and what is in one matrix with it"


def _multiply(shapes: Mapping[Role, tuple[int, ...]], shape: tuple[int, ...]) -> bool:
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
    component = name.partition("/")[0]
    config = weights.configs.get(component, weights.configs.get(""))
    configured = None if config is None else config.scale(written_module(keys["down"], component), rank)
    if "alpha" in keys:
        scale = weights.number(keys["alpha"]) / rank
        if configured not in (None, scale):
            raise ForeignFile(
                f"{weights.path.name} says by {keys['alpha'][:100]} that these factors count {scale:g} times, and by its "
                f"configuration {configured:g} times; take away the one not meant"
            )
        return scale
    if configured is not None:
        return configured
    if any(key.startswith(PEFT_PREFIX) for key in keys.values()):
        raise ForeignFile(
            f"{weights.path.name} is a PEFT adapter without its {CONFIG}, which says by how much its factors count; name the "
            "adapter's folder, or the weights in it under their own name"
        )
    if weights.settings:
        raise ForeignFile(
            f"{weights.path.name} has more than tensors in it ({', '.join(map(repr, weights.settings[:5]))}), which may say by "
            "how much its factors count, and is not read; convert it with the tool it comes from, or save its tensors alone "
            "as .safetensors where they count as they are"
        )
    return 1.0


Meaning = Literal["change", "weights"]
ALIKE = 0.25
"""Plain tensors are edited weights when the squared difference from the base is below this part of its square."""
SAMPLE = 32
"""How many tensors are looked at to decide."""


@dataclass(frozen=True)
class TensorEdit:
    """One tensor's edit: `wanted` instead of `original`, which is the base's value, rounded to the file's dtype where that
    is the coarser one (`rounded`); and what was added, float64.

    `given` says that the file holds the change itself, and not weights that it was worked out from."""

    original: Tensor
    wanted: Tensor
    change: Tensor
    rounded: torch.dtype | None = None
    given: bool = False


@dataclass(frozen=True)
class FileEdits:
    """All edits of a file: which tensors of the base it speaks about, and each edit on demand.

    Where the file has two factors, they are the edit. None: the tensor stays the same.
    """

    dialect: str
    meaning: Meaning
    names: tuple[str, ...]
    matched: int
    unmatched: tuple[str, ...]
    dtypes: tuple[str, ...]
    edit: Callable[[str], TensorEdit | Pair | None] = field(repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)


def edits_of_file(
    base: Base, weights: ForeignWeights, reading: FileReading, meaning: Meaning | None, keep_rounding: bool
) -> FileEdits:
    """The edits of a file of keys. Raises ForeignFile when it cannot be decided whether it holds changes or weights."""
    meaning = meaning or _meaning(base, weights, reading)

    def edit(name: str) -> TensorEdit | Pair | None:
        keys, rows = reading.parts[name], reading.rows.get(name)
        if not keys.keys() & {"difference", "value"}:
            pair = factors(weights, name, keys, base.places[name].shape, rows)
            return None if pair is None or is_zero(*pair) else pair
        original = base.tensor(name)
        if "difference" in keys or ("value" in keys and meaning == "change"):
            key = keys.get("difference") or keys["value"]
            return _changed(original, _fitting(weights, key, name, original.shape, rows).double())
        value = _fitting(weights, keys["value"], name, original.shape, rows)
        return edited(original, value, weights.shapes[keys["value"]][0], keep_rounding)

    keys = [key for roles in reading.parts.values() for role, key in roles.items() if role != "alpha"]
    return FileEdits(
        reading.dialect.name,
        meaning,
        tuple(sorted(reading.parts)),
        reading.matched,
        reading.unmatched,
        _dtypes(weights.shapes[key][0] for key in keys),
        edit,
        weights.metadata,
    )


def edits_of_checkpoint(base: Base, path: Path, keep_rounding: bool) -> FileEdits | None:
    """The edits of a whole pipeline, folder or single file; None when there is something else at the path.

    Raises ForeignFile when it is of another architecture than the base.
    """
    if path.is_dir() and not (path / "model_index.json").is_file():
        return None
    try:
        other = Base.open(path)
    except UnknownLayout:
        return None
    if other.layout.name != base.layout.name:
        raise ForeignFile(f"{path} is a {other.layout.name}, the base at {base.path} a {base.layout.name}")
    common = [name for name in base.names if name in other.places]
    denoisers = {name.partition("/")[0] for name in base.projections()}
    if lacking := [name for name in base.names if name not in other.places and name.partition("/")[0] in denoisers]:
        raise ForeignFile(
            f"{path} lacks {lacking[0]}, of {len(lacking)} weights that the base at {base.path} has, so it is not whole; get it "
            "again, or name the file of the edited weights alone"
        )
    for name in common:
        if other.places[name].shape != base.places[name].shape:
            raise _other_shape(path.name, name, other.places[name].shape, base.places[name].shape)
    return FileEdits(
        f"{'single file' if other.is_single_file else 'diffusers folder'}",
        "weights",
        tuple(name for name in common if DTYPES[base.places[name].entry.dtype] in (*FLOATS, *FP8)),
        len(common),
        tuple(name for name in other.names if name not in base.places),
        _dtypes(DTYPES[place.entry.dtype] for place in other.places.values()),
        lambda name: edited(base.tensor(name), *_as_stored(other.tensor(name)), keep_rounding),
    )


def _as_stored(value: Tensor) -> tuple[Tensor, torch.dtype]:
    """A value in a dtype that can be added up, and the dtype in which its file has it."""
    return (value.to(torch.float32) if value.dtype in FP8 else value), value.dtype


def edited(original: Tensor, value: Tensor, stored: torch.dtype, keep_rounding: bool) -> TensorEdit | None:
    """The edit that makes `value`, which its file has in the dtype `stored`, of a base's tensor; None where it changes nothing.

    Raises ForeignFile when the value is too large for the base's dtype.
    """
    start, rounded = original, None
    if not keep_rounding and torch.finfo(stored).eps > torch.finfo(original.dtype).eps:
        start, rounded = original.to(stored), stored
    # No sum is computed in float8; all dtypes that a base may have hold its values exactly.
    start = start.to(original.dtype) if stored in FP8 else start
    wanted = value.to(start.dtype)
    if identical(wanted, start):
        return None
    if not all_finite(wanted) or not all_finite(start):
        raise ForeignFile(
            f"a value is beyond what {dtype_name(rounded or start.dtype)} holds, in which it is stored or compared; use a "
            "base or a file of a wider dtype"
        )
    return TensorEdit(start, wanted, value.double() - start.double(), rounded)


def _changed(original: Tensor, change: Tensor) -> TensorEdit | None:
    if not bool(change.any()):
        return None
    return TensorEdit(original, (original.double() + change).to(original.dtype), change, given=True)


def _fitting(weights: ForeignWeights, key: str, name: str, shape: torch.Size, rows: Rows | None = None) -> Tensor:
    """A tensor of the base's shape; matrices are sometimes stored as 1 x 1 kernels, and the other way round."""
    found, whole = weights.shapes[key][1], _whole(shape, rows)
    if found != whole and (found[:2] != whole[:2] or {*found[2:], *whole[2:]} != {1}):
        raise _other_shape(weights.path.name, _with_others(name, rows), found, whole)
    values = weights.tensor(key).reshape(whole)
    return values if rows is None else rows.of(values)


def _other_shape(file: str, name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> ForeignFile:
    hint = "it was made for another base"
    if "token_embedding" in name and found[1:] == shape[1:]:
        hint = "it adds words to the vocabulary, which a patch cannot"
    return ForeignFile(f"{file} has shape {list(found)} for {name}, which has {list(shape)} here; {hint}")


def _meaning(base: Base, weights: ForeignWeights, reading: FileReading) -> Meaning:
    """Whether plain tensors are edited weights or changes, by how far they are from the base."""
    plain = {name: keys["value"] for name, keys in reading.parts.items() if "value" in keys}
    if not plain:
        return "change"
    matrices = [name for name in plain if len(base.places[name].shape) > 1]
    apart, length = [], []
    for name in islice(sorted(matrices or plain), SAMPLE):
        weight = base.tensor(name).double()
        value = _fitting(weights, plain[name], name, weight.shape, reading.rows.get(name)).double()
        size = float(weight.square().sum()) or 1.0
        apart.append(float((value - weight).square().sum()) / size)
        length.append(float(value.square().sum()) / size)
    # The median, because one layer that was edited much says nothing about all the others.
    if median(apart) < ALIKE:
        return "weights"
    if median(length) < ALIKE:
        return "change"
    raise ForeignFile(
        f"{weights.path.name} has tensors that are neither like the base's weights nor small beside them, so it cannot "
        "be decided whether they replace or change them; name the right base, or say which it is"
    )


def _dtypes(found: Iterable[torch.dtype]) -> tuple[str, ...]:
    return tuple(sorted({dtype_name(dtype) for dtype in found}))


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
    options, path = options or Options(), typed_path(path)
    if not path.exists():
        raise NotFound(f"there is no file or folder at {path}; name the one to import")
    edits = edits_of_checkpoint(base, path, options.keep_rounding)
    if edits is None:
        weights = open_weights(path)
        reading = detect(DIALECTS, base, weights.shapes)
        edits = edits_of_file(base, weights, reading, options.meaning, options.keep_rounding)
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
    return Imported(delta, edits, tuple(sorted(fits)), _prove(base, path, delta, fits, edits, report))


def _fit(edit: TensorEdit | Pair, tolerance: float) -> Fitted:
    if isinstance(edit, tuple):
        return Fitted(factors=edit)
    # Residual bits are those of one result in the base's own dtype: not of a change, nor of a base that was rounded.
    with_bits = edit.rounded is None and not edit.given
    return fit_edit(edit.original, edit.wanted, edit.change, tolerance=tolerance, with_bits=with_bits)


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


def _prove(
    base: Base, path: Path, delta: Delta, fits: Mapping[str, Fitted], edits: FileEdits, report: Progress
) -> Proof:
    """Compose the delta on the base, read the file once more, and compare.

    Where the file's factors are the delta's own, what they add is what the file says: only whether there is room is seen to.
    """
    planned = plan(base, [Term("", delta)])
    differing = of = 0
    worst, where, dtypes, rounded = 0.0, "", Counter[str](), False
    for step, (name, fit) in enumerate(fits.items()):
        report(len(fits) + step, 2 * len(fits), name)
        place = base.places[name]
        of += math.prod(place.shape)
        edit = edits.edit(name)
        if edit is None:
            raise BrokenFile(f"{path} changed while it was imported; nothing was stored: import it again")
        if isinstance(edit, tuple):
            coarser = None
            if fit.factors is not None and all(map(identical, edit, fit.factors)):
                planned.check_range(name)
                dtypes[dtype_name(DTYPES[place.entry.dtype])] += 1
                continue
            composed, wanted = planned.tensor(name), Fitted(factors=edit).added_to(base.tensor(name))
        else:
            coarser, wanted = edit.rounded, edit.wanted
            composed = fit.added_to(edit.original) if coarser else planned.tensor(name)
        dtypes[dtype_name(coarser or composed.dtype)] += 1
        rounded = rounded or coarser is not None
        if not identical(composed, wanted):
            left = residual(composed, wanted)
            differing += len(left[0]) if left else 0
            error = _relative(composed, wanted)
            worst, where = max((worst, where), (error, name))
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
