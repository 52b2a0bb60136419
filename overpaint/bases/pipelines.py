"""The diffusers pipeline of a base: which of the components that its index names are there, and loading it.

Safety checkers, image encoders and feature extractors are optional: published folders often have their configuration
alone, or nothing of them. A pipeline draws without, and an index that names them keeps diffusers from loading it.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from overpaint.bases.checkpoint import BrokenBase
from overpaint.bases.layout import Layout, UnknownLayout, layout_of
from overpaint.bases.loading import quiet_loading
from overpaint.bases.safetensors_file import BrokenFile, SafetensorsFile, other_kind
from overpaint.core.errors import OverpaintError

SETTINGS = ("preprocessor_config.json", "processor_config.json", "scheduler_config.json", "tokenizer_config.json")
"""The file by which a component without weights is loaded; any other has `config.json` and weights."""
_PICKLES = (".bin", ".pt", ".pth")


def required_components(layout: Layout) -> set[str]:
    """The components without which nothing is drawn: the models, what makes tokens of a prompt, and the scheduler."""
    return {"scheduler", *layout.components, *(each.tokenizer for each in layout.text_inputs.values())}


def absent_components(folder: Path, index: Mapping[str, Any], layout: Layout, *, weights: bool = True) -> list[str]:
    """The optional components that an index names and that its folder does not have whole, sorted.

    `weights`: whether models may be loaded from the folder; otherwise they all count as absent.
    """
    named = {name for name, value in index.items() if isinstance(value, list) and any(value)}
    optional = named - required_components(layout)
    return sorted(name for name in optional if not _is_there(folder / name, weights))


def class_of_diffusers(name: str) -> Any:
    """A pipeline's class. Raises OverpaintError where diffusers offers it together with a package that is not installed."""
    import diffusers

    found = getattr(diffusers, name)
    # What stands for a class that cannot be used says which packages that takes.
    if lacking := [each for each in getattr(found, "_backends", ()) if importlib.util.find_spec(each) is None]:
        raise OverpaintError(f"{name} needs the package {lacking[0]}; run `pip install {lacking[0]}`")
    return found


@contextmanager
def loading(what: str, path: Path) -> Iterator[None]:
    """Within the block, which uses diffusers or transformers to load `what`, any error of theirs is one sentence: BrokenBase."""
    try:
        with quiet_loading():
            yield
    except (OverpaintError, MemoryError, torch.OutOfMemoryError):
        raise
    # A missing or damaged configuration makes the libraries raise nearly anything.
    except Exception as error:
        why = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise BrokenBase(
            f"{what} of the base at {path} cannot be loaded ({why}); get its configuration again"
        ) from error


def check_configuration(folder: Path, layout: Layout, channels: int | None, file: Path) -> None:
    """Raise UnknownLayout unless a folder is the configuration of a single `file`, as far as that shows without weights."""
    denoiser = layout.input.partition("/")[0]
    configured = _object(folder / denoiser / "config.json").get("in_channels") if denoiser else None
    if layout_of(folder).name != layout.name or (channels and configured and configured != channels):
        held = f"{layout.name}{f' of {channels} input channels' if channels else ''}"
        raise UnknownLayout(
            f"{folder} is no configuration of {file.name}, which is a {held}; put that of such a model there"
        )


def check_tokenizer(folder: Path) -> None:
    """Raise BrokenBase unless a folder has a tokenizer's vocabulary: transformers would make an empty tokenizer of none."""
    whole = any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model", "tokenizer.model"))
    if not whole and not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise BrokenBase(f"{folder} has no vocabulary, without which no prompt is read; get the base's tokenizer again")


def _is_there(component: Path, weights: bool) -> bool:
    for name in SETTINGS:
        if (component / name).is_file():
            return bool(_object(component / name))
    return weights and bool(_object(component / "config.json")) and any(map(_has_weights, component.iterdir()))


def _object(file: Path) -> dict[str, Any]:
    """What a JSON file of settings holds; nothing where it is missing or damaged."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _has_weights(file: Path) -> bool:
    """Whether a file is somebody's weights, and not what stands for them while they are not downloaded."""
    try:
        if file.suffix == ".safetensors":
            return bool(SafetensorsFile.open(file).entries)
        if file.suffix not in _PICKLES or not file.is_file():
            return False
        with file.open("rb") as opened:
            beginning = opened.read(128)
    except (OSError, BrokenFile):
        return False
    return bool(beginning) and (beginning[:1] in (b"P", b"\x80") or not other_kind(beginning))


def mended_index(index: Mapping[str, Any], layout: Layout, kind: str, absent: Collection[str]) -> dict[str, Any]:
    """A pipeline's index with which diffusers loads and draws: the `absent` components are named no more, and a denoiser
    with a class of its own by its channels is no longer called a plain one."""
    changed = {**index, **{name: [None, None] for name in absent}}
    if "safety_checker" in absent and "requires_safety_checker" in index:
        changed["requires_safety_checker"] = False
    if index["_class_name"] == layout.pipelines[0]:
        changed["_class_name"] = kind
    return changed


def blank_inputs(pipe: Any, count: int) -> dict[str, Any]:
    """What a pipeline that edits pictures needs beside `count` prompts to draw from them alone: grey pictures, and masks
    that let it paint everywhere; nothing for one that draws from prompts."""
    asked = inspect.signature(pipe.__call__).parameters
    if "image" not in asked or not hasattr(pipe, "unet"):
        return {}
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    blank = {"image": [Image.new("RGB", (size, size), "grey")] * count}
    if "mask_image" not in asked:
        return blank
    return {**blank, "mask_image": [Image.new("L", (size, size), 255)] * count, "strength": 1.0}


def pipeline_beside(pipe: Any) -> Any:
    """A pipeline of the same models, with all else its own: schedulers remember a step, and tokenizers how they pad."""
    beside = copy.copy(pipe)
    own = {name: part for name, part in pipe.components.items() if not isinstance(part, nn.Module)}
    # Not by assignment, which would write into the configuration that both share.
    vars(beside).update(copy.deepcopy(own))
    return beside


def load_pipeline(
    kind: str,
    path: Path,
    config: Path,
    layout: Layout,
    absent: Collection[str],
    variant: str | None,
    dtype: torch.dtype,
) -> Any:
    """A fresh diffusers pipeline of that class from a folder or a single file, without a safety checker or what is absent.

    Raises BrokenBase when diffusers cannot load it.
    """
    for text_input in layout.text_inputs.values():
        check_tokenizer(config / text_input.tokenizer)
    with loading("the pipeline", path):
        pipeline_class = class_of_diffusers(kind)
        known = inspect.signature(pipeline_class.__init__).parameters
        without: dict[str, Any] = {name: None for name in {*absent, "safety_checker"} if name in known}
        if "requires_safety_checker" in known:
            without["requires_safety_checker"] = False
        how = {"dtype": dtype, "local_files_only": True, **without}
        if path.is_file():
            pipe = pipeline_class.from_single_file(str(path), config=str(config), **how)
        elif layout.is_caught:  # some of these refuse to be loaded in full
            pipe = pipeline_class.from_pretrained(path, variant=variant, **how)
        else:
            pipe = pipeline_class.from_pretrained(path, variant=variant, low_cpu_mem_usage=False, **how)
    pipe.set_progress_bar_config(disable=True)
    return pipe
