"""The diffusers pipeline of a base: which of the components that its index names are there, and loading it.

Safety checkers, image encoders and feature extractors are optional: published folders often have their configuration
alone, or nothing of them. A pipeline draws without, and an index that names them keeps diffusers from loading it.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from overpaint.bases.checkpoint import BrokenBase
from overpaint.bases.layout import Layout
from overpaint.bases.loading import quiet_loading
from overpaint.bases.safetensors_file import BrokenFile, SafetensorsFile, other_kind

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


def check_tokenizer(folder: Path) -> None:
    """Raise BrokenBase unless a folder has a tokenizer's vocabulary: transformers would make an empty tokenizer of none."""
    whole = any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model"))
    if not whole and not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise BrokenBase(f"{folder} has no vocabulary, without which no prompt is read; get the base's tokenizer again")


def _is_there(component: Path, weights: bool) -> bool:
    for name in SETTINGS:
        if (component / name).is_file():
            return _is_object(component / name)
    return weights and _is_object(component / "config.json") and any(map(_has_weights, component.iterdir()))


def _is_object(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_text("utf-8")), dict)
    except (OSError, ValueError, RecursionError):
        return False


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


def index_without(index: Mapping[str, Any], absent: Collection[str]) -> bytes:
    """A pipeline's index that names some components no more, as diffusers would write it."""
    changed = {**index, **{name: [None, None] for name in absent}}
    if "safety_checker" in absent and "requires_safety_checker" in index:
        changed["requires_safety_checker"] = False
    return (json.dumps(changed, indent=2) + "\n").encode()


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
    with quiet_loading():
        import diffusers

        found: Any = getattr(diffusers, kind)
        known = inspect.signature(found.__init__).parameters
        without: dict[str, Any] = {name: None for name in {*absent, "safety_checker"} if name in known}
        if "requires_safety_checker" in known:
            without["requires_safety_checker"] = False
        how = {"dtype": dtype, "local_files_only": True, **without}
        try:
            if path.is_file():
                pipe = found.from_single_file(str(path), config=str(config), **how)
            else:
                pipe = found.from_pretrained(path, variant=variant, low_cpu_mem_usage=False, **how)
        # What a missing or damaged configuration makes diffusers and transformers raise.
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            why = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            raise BrokenBase(
                f"diffusers cannot load the base at {path} ({why}); get its configuration again"
            ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe
