"""The nodes. Of ComfyUI they use what it offers to nodes: `ModelPatcher.clone`, `add_patches` and `get_key_patches`, the same on
CLIP, and the key maps by which it loads LoRAs (`comfy.lora`). A model in ComfyUI is never written to: a clone carries patches.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import overpaint
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.core.names import checked_number, parsed_number, typed_path
from overpaint.patches.formats.dialects import split
from overpaint.patches.formats.exporting import FORMATS, KEY
from overpaint.registry import Registry
from overpaint.registry.records import PatchRecord, RecipeRecord
from overpaint.workspace.workspace import Workspace

UP = (".lora_up.weight", ".lora_B.weight")
DOWN = (".lora_down.weight", ".lora_A.weight")
ENDINGS = (*UP, *DOWN, ".alpha", ".diff", ".diff_b", ".w_norm", ".b_norm")
REFUSE, APPLY = "refuse", "apply"

Key = str | tuple[Any, ...]
"""Where ComfyUI keeps a weight: its name, or name and (dimension, start, length) where it is a part of a larger one."""


class CannotApply(OverpaintError, ValueError):
    """What does not fit the model in ComfyUI, or was not given as a node takes it. ComfyUI shows the sentence at the node."""


@dataclass(frozen=True)
class Wanted:
    """What is to be applied: the arrays of a LoRA or difference file, and what it is in words.

    `digest` is that of the weights as a recipe's history has it, empty where there is none. `base` has the base's own values of
    the changed weights, by module and ending (weight or bias), where they are known.
    """

    arrays: Mapping[str, Tensor]
    title: str
    digest: str
    base: Mapping[tuple[str, str], Tensor]

    @property
    def modules(self) -> list[str]:
        """The modules that the file changes, by its names."""
        return sorted({_module(key) for key in self.arrays})


def _module(key: str) -> str:
    for ending in ENDINGS:
        if key.endswith(ending):
            return key.removesuffix(ending)
    raise CannotApply(f"the file has the key {key!r}, which is none of a LoRA or a difference; export the recipe again")


# Where patches come from


def from_file(file: Path) -> Wanted:
    """What `overpaint recipe export` or `patch export` wrote, whole. Raises CannotApply for any other file."""
    try:
        with safe_open(str(file), "pt") as opened:
            header = opened.metadata() or {}
            arrays = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # not a mapping
        digest = _digest_of_arrays(file)
    except Exception as error:  # safetensors raises its own kinds, and what the disk says
        raise CannotApply(f"{file} cannot be read as a safetensors file ({error}); export the recipe again") from error
    if KEY not in header:
        raise CannotApply(f"{file.name} was not exported by Overpaint; load it with ComfyUI's own Load LoRA")
    if header.get("modelspec.hash_sha256", f"0x{digest}") != f"0x{digest}":
        raise CannotApply(
            f"{file.name} is not what its header says: it was damaged or altered after it was exported; export the recipe again"
        )
    return Wanted(arrays, f"file {file.name} (sha256 {digest}): {_listed(_patches_in(file, header[KEY]))}", "", {})


def _digest_of_arrays(file: Path) -> str:
    """The digest of all that follows the header, as an export has it in its header."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        opened.seek(8 + int.from_bytes(opened.read(8), "little"))
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _patches_in(file: Path, about: str) -> list[tuple[str, float]]:
    """The concepts and strengths that the header of an export lists. Raises CannotApply."""
    try:
        listed = json.loads(about)["patches"]
        return [(str(each["concept"]), checked_number(each["strength"], "a strength")) for each in listed]
    except (OverpaintError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CannotApply(
            f"the header of {file.name} does not say which patches are in it ({error!r:.100}); export the recipe again"
        ) from error


def from_registry(workspace: Workspace, base: str, strengths: Mapping[str, float], title: str, digest: str) -> Wanted:
    """Patches of a registry (strengths by id) in the form that ComfyUI loads without loss."""
    from overpaint.workspace.exchange import export_patches

    records = [(workspace.registry.patch(patch_id), strength) for patch_id, strength in strengths.items()]
    listed = _listed((record.concept, strength) for record, strength in records)
    with tempfile.TemporaryDirectory(prefix="overpaint-comfyui-") as folder:
        out = Path(folder) / "patches.safetensors"
        exported = export_patches(
            workspace,
            base,
            records,
            out,
            None,
            title,
            for_="comfyui",
            dtype="float32",
            truncate=None,
            progress=lambda step, of, text: None,
        )
        with safe_open(str(out), "pt") as opened:
            arrays = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
    opened_base = workspace.base(base)
    spelled = FORMATS[exported.format].module_names(opened_base)
    own = {(spelled[split(name)[0]], split(name)[1]): opened_base.tensor(name) for name in exported.errors}
    return Wanted(arrays, f"{title} on {base}: {listed}", digest, own)


def _listed(patches: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{concept} {strength:g}" for concept, strength in sorted(patches))


def recipe_of(registry: str, recipe: str, revision: str) -> tuple[Workspace, str]:
    """A registry and the name of a recipe in it, with the revision where one is asked for."""
    from overpaint.commands.common import default_registry

    workspace = overpaint.open(registry.strip() or default_registry(), create=False)
    name = f"{recipe.strip()}@{revision.strip()}" if revision.strip() else recipe.strip()
    return workspace, name


# Onto the model


@dataclass(frozen=True)
class Applied:
    """Clones of MODEL and CLIP that carry the patches, and what to say about it."""

    model: Any
    clip: Any
    text: str


def apply(model: Any, clip: Any, wanted: Wanted, strength: float, other_base: str) -> Applied:
    """Clones with everything that is wanted. Raises CannotApply when a key has no place, or a weight is not the base's."""
    import comfy.lora

    key_map: dict[str, Key] = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
    modules = wanted.modules
    if missing := [module for module in modules if module not in key_map]:
        hint = "connect CLIP: it changes the text encoder" if clip is None and len(missing) < len(modules) else ""
        raise CannotApply(
            f"{len(missing)} of {len(modules)} keys have no place in this model, first {missing[0]}, so nothing is applied; "
            + (hint or "load a checkpoint of the patches' base")
        )
    weights = _weights(model, clip)
    _check_shapes(wanted, key_map, weights)
    differing, compared = _compare(wanted, key_map, weights)
    if differing and other_base == REFUSE:
        raise CannotApply(
            f"this model is not the base of the patches: {len(differing)} of {compared} weights differ, first {differing[0]}; "
            f"load the base, or choose {APPLY!r} under other_base"
        )
    loaded = comfy.lora.load_lora(dict(wanted.arrays), key_map, log_missing=False)
    if unread := _changed_keys(wanted, key_map) - {_name_and_part(key) for key in loaded}:
        raise CannotApply(
            f"ComfyUI does not understand the change of {len(unread)} weights, first {min(map(str, unread))}, so nothing is "
            "applied; export the recipe again with --for comfyui"
        )
    patched, patched_clip = model.clone(), None if clip is None else clip.clone()
    placed = set(patched.add_patches(loaded, strength))
    if patched_clip is not None:
        placed |= set(patched_clip.add_patches(loaded, strength))
    if left := set(loaded) - placed:
        raise CannotApply(
            f"ComfyUI left out {len(left)} of {len(loaded)} weights, first {next(iter(left))}; nothing is applied"
        )
    known = (
        f"{compared - len(differing)} of {compared} weights are the base's" if compared else "the base is not compared"
    )
    recorded = wanted.digest if strength == 1 and not differing else ""
    lines = [
        wanted.title,
        *([f"all at {strength:g} of these strengths"] if strength != 1 else []),
        f"{len(modules)} of {len(modules)} keys have their place; {known}",
        f"weights as the registry recorded them: {recorded}" if recorded else "weights: of no recorded digest",
    ]
    return Applied(patched, patched_clip, "\n".join(lines))


def _weights(model: Any, clip: Any) -> dict[str, Tensor]:
    """The weights in memory as they were loaded, whatever other nodes have put on them."""
    found = model.get_key_patches()
    if clip is not None:
        found = {**found, **clip.patcher.get_key_patches()}
    # Older versions of ComfyUI have the weight itself first, newer ones a pair of it and a conversion.
    return {key: first[0] if isinstance(first, tuple) else first for key, (first, *_) in found.items()}


def _placed(key: Key, weights: Mapping[str, Tensor], ending: str = "weight") -> Tensor | None:
    name, part = _name_and_part(key)
    if ending == "bias":
        name = f"{name.removesuffix('.weight')}.bias"
    weight = weights.get(name)
    return weight if weight is None or part is None else weight.narrow(*part)


def _name_and_part(key: Key) -> tuple[str, Any]:
    return (key, None) if isinstance(key, str) else (key[0], key[1] if len(key) > 1 else None)


def _changed_keys(wanted: Wanted, key_map: Mapping[str, Key]) -> set[tuple[str, Any]]:
    """Name and part of every weight that the file changes."""
    changed = set()
    for key in wanted.arrays:
        name, part = _name_and_part(key_map[_module(key)])
        if key.endswith((".diff_b", ".b_norm")):
            changed.add((f"{name.removesuffix('.weight')}.bias", None))
        elif not key.endswith(".alpha"):
            changed.add((name, part))
    return changed


def _check_shapes(wanted: Wanted, key_map: Mapping[str, Key], weights: Mapping[str, Tensor]) -> None:
    # ComfyUI itself only writes a line into its log about a shape that does not fit, when it is about to draw.
    for module in wanted.modules:
        weight = _placed(key_map[module], weights)
        shape = _shape(wanted.arrays, module)
        if weight is None or (shape is not None and shape != (weight.shape[0], math.prod(weight.shape[1:]))):
            raise CannotApply(
                f"the change of {module} is for a weight of {shape}, and this model's has "
                f"{None if weight is None else list(weight.shape)}; load a checkpoint of the patches' base"
            )


def _shape(arrays: Mapping[str, Tensor], module: str) -> tuple[int, int] | None:
    """Rows and columns of what a file adds to a module's weight, None where it adds to something else."""
    up = next((arrays[key] for ending in UP if (key := module + ending) in arrays), None)
    down = next((arrays[key] for ending in DOWN if (key := module + ending) in arrays), None)
    whole = arrays.get(f"{module}.diff", arrays.get(f"{module}.w_norm"))
    if (up is None) != (down is None) or any(each is not None and each.dim() == 0 for each in (up, down, whole)):
        raise CannotApply(f"the file has a part of the change of {module} only; export the recipe again")
    if up is not None and down is not None:
        return up.shape[0], math.prod(down.shape[1:])
    return None if whole is None else (whole.shape[0], math.prod(whole.shape[1:]))


def _compare(wanted: Wanted, key_map: Mapping[str, Key], weights: Mapping[str, Tensor]) -> tuple[list[str], int]:
    """The changed weights that are not the base's, and how many were compared, in the precision that the model has."""
    differing = []
    for (module, ending), own in wanted.base.items():
        weight = _placed(key_map[module], weights, ending)
        if weight is None or not torch.equal(own.to(weight.dtype).reshape(weight.shape), weight.detach().cpu()):
            differing.append(f"{module}.{ending}")
    return differing, len(wanted.base)


# What ComfyUI shows

LARGEST = 10.0
STRENGTH = ("FLOAT", {"default": 1.0, "min": -LARGEST, "max": LARGEST, "step": 0.05})
REGISTRY = ("STRING", {"default": "", "tooltip": "Folder or URL of a registry; empty is your own."})


@dataclass(frozen=True)
class PatchList:
    """What goes from one node to the other: a registry, a base in it, and strengths by patch id."""

    registry: str
    base: str
    strengths: Mapping[str, float]


class OverpaintPatches:
    """A list of patches with strengths."""

    CATEGORY, FUNCTION = "Overpaint", "listed"
    RETURN_TYPES, RETURN_NAMES = ("OVERPAINT_PATCHES", "STRING"), ("patches", "text")
    DESCRIPTION = "Patches of an Overpaint registry, a concept or id and a strength per line."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        tip = "CONCEPT or ID, and a strength from -10 to 10; one per line. Without a strength it is 1."
        lines = {"default": "cat 1.0", "multiline": True, "tooltip": tip}
        base = {"default": "", "tooltip": "Name of the base; empty where the registry has one."}
        return {"required": {"registry": REGISTRY, "patches": ("STRING", lines), "base": ("STRING", base)}}

    @classmethod
    def IS_CHANGED(cls, registry: str, patches: str, base: str) -> str:
        """Another value where a concept's newest patch is another one by now."""
        return _or_sentence(lambda: str(cls().listed(registry, patches, base)[1]))

    def listed(self, registry: str, patches: str, base: str) -> tuple[PatchList, str]:
        """The list, and in words what it holds.

        Raises NotFound for an unknown patch or base, CannotApply for a patch that is listed twice or a strength that is none.
        """
        workspace, _ = recipe_of(registry, "", "")
        name = workspace.base_name(base.strip() or None)
        chosen: dict[str, tuple[str, float]] = {}
        for line in filter(None, (" ".join(each.split()) for each in patches.splitlines())):
            record, strength = _line(workspace.registry, line, name)
            if record.id in chosen:
                raise CannotApply(
                    f"the patch {record.id[:12]} ({record.concept}) is listed twice; keep one of the lines"
                )
            chosen[record.id] = (record.concept, strength)
        text = "\n".join(
            f"{concept} {strength:g} ({patch_id[:12]})" for patch_id, (concept, strength) in chosen.items()
        )
        return PatchList(registry, name, {patch_id: strength for patch_id, (_, strength) in chosen.items()}), text


def _line(registry: Registry, line: str, base: str) -> tuple[PatchRecord, float]:
    """The patch and the strength of a line. A name may end in a number (boeing 747), so the whole line is tried first."""
    try:
        return registry.patch(line, base=base), 1.0
    except NotFound:
        *key, last = line.rsplit(None, 1)
        try:
            strength = parsed_number(last, "a strength")
        except OverpaintError:
            key = []  # the last word of a name of several
        if not key:
            raise
    record = registry.patch(key[0], base=base)
    if abs(strength) > LARGEST:
        raise CannotApply(
            f"a strength is from -{LARGEST:g} to {LARGEST:g}, and the line {line!r} asks for {record.concept!r} at "
            f"{strength:g}; no patch is for a concept of that whole name"
        )
    return record, strength


def _or_sentence(value: Callable[[], str]) -> str:
    """A value that tells ComfyUI whether to run a node again, or why there is none: the node itself shows that."""
    try:
        return value()
    except (OverpaintError, OSError) as error:
        return str(error)


class ApplyOverpaintRecipe:
    """MODEL and CLIP with a recipe, a file or a list of patches applied."""

    CATEGORY, FUNCTION = "Overpaint", "applied"
    RETURN_TYPES, RETURN_NAMES = ("MODEL", "CLIP", "STRING"), ("model", "clip", "text")
    DESCRIPTION = (
        "Erase what a recipe erases. It refuses a model that is not the patches' base, and keys without a place."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        recipe = {"default": "default", "tooltip": "Name of a recipe, or a .safetensors file that Overpaint exported."}
        revision = {"default": "", "tooltip": "Number or tag of an earlier revision; empty is the newest."}
        return {
            "required": {
                "model": ("MODEL",),
                "registry": REGISTRY,
                "recipe": ("STRING", recipe),
                "revision": ("STRING", revision),
                "strength": STRENGTH,
                "other_base": ([REFUSE, APPLY],),
            },
            "optional": {"clip": ("CLIP",), "patches": ("OVERPAINT_PATCHES",)},
        }

    @classmethod
    def IS_CHANGED(cls, registry: str, recipe: str, revision: str, **others: Any) -> str:
        """Another value when the recipe or the file is another by now, so that a takedown reaches the next prompt."""

        def state() -> str:
            if (file := _file(recipe)) is not None:
                return f"{file.stat().st_size} {file.stat().st_mtime_ns}"
            return repr(_recipe(registry, recipe, revision)[1].patches)

        return _or_sentence(state)

    def applied(
        self,
        model: Any,
        registry: str,
        recipe: str,
        revision: str,
        strength: float,
        other_base: str,
        clip: Any = None,
        patches: PatchList | None = None,
    ) -> tuple[Any, Any, str]:
        """Clones of model and clip with everything applied, and what that is in words. Raises OverpaintError."""
        checked_number(strength, "a strength")
        wanted = self._wanted(registry, recipe, revision, patches)
        if wanted is None or strength == 0:
            return model, clip, "nothing is applied: this is the model as it was loaded"
        done = apply(model, clip, wanted, strength, other_base)
        return done.model, done.clip, done.text

    def _wanted(self, registry: str, recipe: str, revision: str, patches: PatchList | None) -> Wanted | None:
        if patches is not None:
            workspace, _ = recipe_of(patches.registry, "", "")
            return _unless_empty(workspace, patches.base, patches.strengths, "patches", "")
        if (file := _file(recipe)) is not None:
            return from_file(file)
        workspace, record = _recipe(registry, recipe, revision)
        title = f"recipe {record.name}@{record.revision}"
        return _unless_empty(workspace, record.base, dict(record.patches), title, record.digest or "")


def _file(recipe: str) -> Path | None:
    """The file that is named instead of a recipe."""
    return typed_path(recipe.strip()) if recipe.strip().lower().endswith(".safetensors") else None


def _recipe(registry: str, recipe: str, revision: str) -> tuple[Workspace, RecipeRecord]:
    workspace, name = recipe_of(registry, recipe, revision)
    return workspace, workspace.recipe(name).record


def _unless_empty(
    workspace: Workspace, base: str, strengths: Mapping[str, float], title: str, digest: str
) -> Wanted | None:
    carried = {patch_id: strength for patch_id, strength in strengths.items() if strength}
    return from_registry(workspace, base, carried, title, digest) if carried else None


NODE_CLASS_MAPPINGS: dict[str, Any] = {
    "ApplyOverpaintRecipe": ApplyOverpaintRecipe,
    "OverpaintPatches": OverpaintPatches,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ApplyOverpaintRecipe": "Apply Overpaint Recipe",
    "OverpaintPatches": "Overpaint Patches",
}
