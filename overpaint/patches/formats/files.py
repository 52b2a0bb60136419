"""What other tools write, opened: a safetensors file, a legacy pickle that holds tensors alone, or an adapter's folder.

Nothing in a file is believed or run: safetensors are read as every container here is, pickles through
`torch.load(weights_only=True)` and mapped into memory; keys stay names and never become paths.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overpaint.bases.container import DTYPES, BrokenFile, Container
from overpaint.bases.digests import dtype_name
from overpaint.bases.pickled import SUFFIXES, PickledContainer
from overpaint.patches.arrays import FLOATS, all_finite
from overpaint.patches.formats.dialect import ForeignFile
from overpaint.patches.formats.diffusers_lora import AdapterConfig, configs_of

PICKLES = (*SUFFIXES, ".bin")
ADAPTER, CONFIG = ("adapter_model.safetensors", "adapter_model.bin"), "adapter_config.json"
_IN_FOLDER = (
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
)
_ADAPTER_CONFIG_LIMIT = 1 << 20


@dataclass(frozen=True)
class ForeignWeights:
    """An opened file: dtype and shape by key, the texts of its header, and what an adapter's configuration says.

    `configs` has it by component, or under "" where it is about whatever component the keys name.
    """

    path: Path
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]] = field(repr=False)
    metadata: Mapping[str, str]
    configs: Mapping[str, AdapterConfig]
    _tensor: Callable[[str], Tensor] = field(repr=False)

    def tensor(self, key: str) -> Tensor:
        """One tensor. Raises ForeignFile unless it is of floating point and all its values are finite."""
        dtype = self.shapes[key][0]
        if dtype not in FLOATS:
            raise ForeignFile(
                f"{self.path.name}: {key[:100]} is {dtype_name(dtype)}; what changes a weight is float16, bfloat16, float32 or "
                "float64: convert the file first"
            )
        values = self._tensor(key)
        if not all_finite(values):
            raise ForeignFile(
                f"{self.path.name}: {key[:100]} has values that are not finite; nothing can be made of it"
            )
        return values


def open_weights(path: Path) -> ForeignWeights:
    """Open a file, or the weights in an adapter's or a model's folder.

    Raises BrokenFile for a file that is damaged or would have to run a program, ForeignFile
    for one of another kind.
    """
    if path.is_dir():
        return _of_folder(path)
    if path.suffix in PICKLES:
        return _of_pickle(path)
    if path.suffix != ".safetensors":
        raise ForeignFile(
            f"{path.name} is none of the files known here: .safetensors, {', '.join(PICKLES)}, or a folder"
        )
    container = Container.open(path)
    return _of_container(container, configs_of(container.metadata))


def _of_folder(folder: Path) -> ForeignWeights:
    adapter = next((folder / name for name in ADAPTER if (folder / name).is_file()), None)
    if adapter is not None:
        opened = open_weights(adapter)
        return ForeignWeights(folder, opened.shapes, opened.metadata, {"": _config(folder / CONFIG)}, opened._tensor)
    found = [folder / name for name in _IN_FOLDER if (folder / name).is_file()]
    if len(found) != 1:
        raise ForeignFile(
            f"{folder} is no folder of a pipeline, of an adapter ({ADAPTER[0]} with {CONFIG}) or of one model "
            f"({', '.join(_IN_FOLDER)}); name a file in it"
        )
    return open_weights(found[0])


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


def _of_container(container: Container, configs: Mapping[str, AdapterConfig]) -> ForeignWeights:
    shapes = {key: (DTYPES[entry.dtype], entry.shape) for key, entry in container.entries.items()}
    return ForeignWeights(container.path, shapes, container.metadata, configs, container.tensor)


def _of_pickle(path: Path) -> ForeignWeights:
    container = PickledContainer.open(path)
    if container.entries:
        return _of_container(container, {})
    values = _nested(path)
    shapes = {key: (value.dtype, tuple(value.shape)) for key, value in values.items()}
    return ForeignWeights(path, shapes, {}, {}, lambda key: values[key].detach().clone())


def _nested(path: Path) -> dict[str, Tensor]:
    """The tensors of a map of state dicts, such as `{"unet": {...}, "text_encoder": {...}}`, by dotted key.

    The file was opened as a PickledContainer before, so that it is no bomb and builds nothing but tensors.
    """
    loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    parts = loaded.items() if isinstance(loaded, dict) else ()
    found = {
        f"{name}.{key}": value
        for name, part in parts
        if isinstance(part, dict)
        for key, value in part.items()
        if isinstance(value, Tensor)
    }
    for key, value in found.items():
        if value.layout != torch.strided or value.nbytes > value.untyped_storage().nbytes():
            raise BrokenFile(f"{path}: {key[:80]} is not a plain tensor; get the file again")
    return found
