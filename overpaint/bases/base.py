"""What a base is: a diffusers folder read tensor by tensor, known by the digest of what is in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from overpaint.bases.digests import combined_digest, tensor_digest
from overpaint.bases.layout import Layout, layout_of
from overpaint.bases.quiet import quiet_loading
from overpaint.errors import NotFound, OverpaintError

EMBEDDED = Path(__file__).parent / "emoji" / "model"


class BrokenBase(OverpaintError):
    """A base with a file missing or cut short."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: a safetensors file and the key it has there."""

    file: Path
    key: str


@dataclass(eq=False)
class Base:
    """An opened base. Nothing here changes it; tensors are read from memory-mapped files when asked for."""

    path: Path
    layout: Layout
    places: dict[str, Place]
    _digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, source: Path | str) -> Base:
        """Open a diffusers folder, or the embedded base under the name `emoji`.

        Raises OverpaintError for a folder that is missing, unknown, incomplete or damaged.
        """
        path = EMBEDDED if str(source) == "emoji" else Path(source).expanduser().absolute()
        layout = layout_of(path)
        places: dict[str, Place] = {}
        for name, component in layout.components.items():
            for file, keys in _weight_files(path / name, component.weights):
                places.update({f"{name}/{component.canonical(key)}": Place(file, key) for key in keys})
        return cls(path, layout, dict(sorted(places.items())))

    @property
    def names(self) -> list[str]:
        """Canonical names of all tensors, sorted."""
        return list(self.places)

    def tensor(self, name: str) -> Tensor:
        """A copy of one tensor, on the CPU, in its stored dtype. Raises NotFound for a name the base lacks."""
        if name not in self.places:
            raise NotFound(f"the base at {self.path} has no tensor {name}")
        place = self.places[name]
        with safe_open(place.file, framework="pt") as reader:
            found: Tensor = reader.get_tensor(place.key)
        return found

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several tensors, each file opened once."""
        wanted = sorted(names, key=lambda n: str(self.places[n].file))
        found: dict[str, Tensor] = {}
        for file in dict.fromkeys(self.places[n].file for n in wanted):
            with safe_open(file, framework="pt") as reader:
                found.update({n: reader.get_tensor(self.places[n].key) for n in wanted if self.places[n].file == file})
        return found

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        """The digest of each named tensor; computed once per opened base."""
        wanted = list(names)
        for name, tensor in self.tensors(n for n in wanted if n not in self._digests).items():
            self._digests[name] = tensor_digest(name, tensor)
        return {name: self._digests[name] for name in wanted}

    def _stamp(self) -> list[list[str | int]]:
        """What changes when a weight file does: its path, size and time of change."""
        files = sorted({place.file for place in self.places.values()})
        return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]

    def keep_digests(self, cache: Path) -> None:
        """Write the digests known so far to a file that `recall_digests` reads while the weight files are the same."""
        text = json.dumps({"stamp": self._stamp(), "digests": self._digests})
        try:
            if cache.is_file() and cache.read_text("utf-8") == text:
                return
            cache.parent.mkdir(parents=True, exist_ok=True)
            scratch = cache.with_name(f"{cache.name}.{os.getpid()}")
            scratch.write_text(text, "utf-8")
            scratch.replace(cache)
        except OSError:
            pass  # only time is lost: the digests are computed again

    def recall_digests(self, cache: Path) -> None:
        """Take digests from a file that `keep_digests` wrote, unless a weight file changed since."""
        try:
            kept = json.loads(cache.read_text("utf-8"))
        except (OSError, ValueError):
            return
        if kept.get("stamp") == self._stamp():
            self._digests.update(kept["digests"])

    @cached_property
    def fingerprint(self) -> str:
        """The digest of every tensor of every component, whatever files they lie in."""
        return combined_digest(self.digests(self.names))

    def readers(self, encoder: str = "text_encoder") -> list[str]:
        """The projections that read a text encoder's output: cross-attention keys and values."""
        return self.layout.readers(encoder, self.names)

    def component_digest(self, component: str) -> str:
        """The digest of one component's tensors."""
        return combined_digest(self.digests(n for n in self.names if n.startswith(f"{component}/")))

    @cached_property
    def extras(self) -> dict[str, Any]:
        """What a base says about itself in `overpaint.json` beside its index: prompt templates, sampler, judges."""
        file = self.path / "overpaint.json"
        return json.loads(file.read_text("utf-8")) if file.is_file() else {}

    def pipeline(self, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """A fresh `StableDiffusionPipeline` of this base."""
        with quiet_loading():
            from diffusers import StableDiffusionPipeline

            pipe: Any = StableDiffusionPipeline.from_pretrained(
                self.path,
                dtype=dtype,
                safety_checker=None,
                requires_safety_checker=False,
                local_files_only=True,
                low_cpu_mem_usage=False,
            )
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device)


def _weight_files(folder: Path, stem: str) -> Iterator[tuple[Path, list[str]]]:
    """The safetensors files of a component and their keys: one file, the shards of an index, or a lone variant."""
    if not folder.is_dir():
        raise BrokenBase(f"the base lacks its folder {folder}; download it again")
    plain, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if plain.is_file():
        files = [plain]
    elif index.is_file():
        files = [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    else:
        files = sorted(folder.glob(f"{stem}.*.safetensors"))[:1]
    if not files:
        raise BrokenBase(f"{folder} has no {stem}.safetensors; a base in another format has to be converted first")
    for file in files:
        yield file, _keys(file)


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as reader:
            return list(reader.keys())
    except (SafetensorError, OSError) as error:
        raise BrokenBase(
            f"{file} cannot be read as safetensors ({error}); it is cut short or damaged: download it again"
        ) from error
