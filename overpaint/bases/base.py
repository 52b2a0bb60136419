"""What a base is: a diffusers folder or a single file, read tensor by tensor, known by the digest of what is in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overpaint.bases.container import Container
from overpaint.bases.digests import combined_digest, tensor_digest
from overpaint.bases.files import BrokenBase, Place, open_folder, open_single_file
from overpaint.bases.layout import Layout
from overpaint.bases.quiet import quiet_loading
from overpaint.errors import NotFound

__all__ = ["EMBEDDED", "Base", "BrokenBase", "Place"]

EMBEDDED = Path(__file__).parent / "emoji" / "model"


@dataclass(eq=False)
class Base:
    """An opened base. Nothing here changes it; tensors are read from their files when asked for.

    `places` has every weight by canonical name, `containers` the files they lie in, `variant` the suffix of a folder's
    weight files where it is not plain (fp16).
    """

    path: Path
    layout: Layout
    places: dict[str, Place] = field(repr=False)
    containers: dict[Path, Container] = field(repr=False)
    variant: str | None = None
    _digests: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, source: Path | str) -> Base:
        """Open a diffusers folder, a single-file checkpoint, or the embedded base under the name `emoji`.

        Raises OverpaintError for a base that is missing, unknown, incomplete or damaged.
        """
        path = EMBEDDED if str(source) == "emoji" else Path(source).expanduser().absolute()
        found = open_single_file(path) if path.is_file() else open_folder(path)
        containers = {part.container.path: part.container for part in found.parts}
        return cls(path, found.layout, found.places(), containers, found.variant)

    @property
    def is_single_file(self) -> bool:
        """Whether all components lie in one file."""
        return self.path in self.containers

    @property
    def names(self) -> list[str]:
        """Canonical names of all tensors, sorted."""
        return list(self.places)

    @cached_property
    def unnamed(self) -> dict[Path, list[str]]:
        """Keys that are no weight of a component (schedules, averages, buffers), by file."""
        named = {(place.file, place.key) for place in self.places.values()}
        return {
            file: [key for key in container.entries if (file, key) not in named]
            for file, container in self.containers.items()
        }

    def tensor(self, name: str) -> Tensor:
        """A copy of one tensor, on the CPU, in its stored dtype. Raises NotFound for a name the base lacks."""
        if name not in self.places:
            raise NotFound(f"the base at {self.path} has no tensor {name}")
        return next(tensor for _, tensor in self._read([name]))

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several tensors, each file opened once."""
        return dict(self._read(names))

    def _read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors one at a time in their canonical shapes, file by file."""
        by_file: dict[Path, dict[str, str]] = {}
        for name in names:
            place = self.places[name]
            by_file.setdefault(place.file, {})[place.key] = name
        for file, wanted in by_file.items():
            for key, tensor in self.containers[file].tensors(wanted):
                yield wanted[key], tensor.reshape(self.places[wanted[key]].shape)

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        """The digest of each named tensor; computed once per opened base."""
        wanted = list(names)
        for name, tensor in self._read(n for n in wanted if n not in self._digests):
            self._digests[name] = tensor_digest(name, tensor)
        return {name: self._digests[name] for name in wanted}

    def _stamp(self) -> list[list[str | int]]:
        """What changes when a weight file does: its path, size and time of change."""
        return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(self.containers)]

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

    @property
    def config_folder(self) -> Path:
        """The diffusers folder with the configurations, tokenizer and scheduler of this base.

        A single file has none of them: they are read from a folder of its name beside it (`model/` for
        `model.safetensors`), or from the published folder of its layout where the Hub's local cache has it. Raises
        NotFound when neither is there.
        """
        if not self.is_single_file:
            return self.path
        beside, published = self.path.with_suffix(""), self.layout.single_file_config
        for folder in (beside, _in_hub_cache(published)):
            if folder is not None and (folder / "model_index.json").is_file():
                return folder
        raise NotFound(
            f"{self.path.name} holds weights alone; put the configuration (a diffusers folder, no weights needed) into "
            f"{beside}, or download {published} once"
        )

    def pipeline(self, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """A fresh `StableDiffusionPipeline` of this base. Raises NotFound for a single file without configuration."""
        config = self.config_folder
        with quiet_loading():
            from diffusers import StableDiffusionPipeline

            no_checker: Any = {"safety_checker": None, "requires_safety_checker": False}
            if self.is_single_file:
                pipe: Any = StableDiffusionPipeline.from_single_file(
                    str(self.path), config=str(config), dtype=dtype, local_files_only=True, **no_checker
                )
            else:
                pipe = StableDiffusionPipeline.from_pretrained(
                    self.path,
                    dtype=dtype,
                    variant=self.variant,
                    local_files_only=True,
                    low_cpu_mem_usage=False,
                    **no_checker,
                )
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device)


def _in_hub_cache(repository: str) -> Path | None:
    """The folder of a published base that was downloaded before; nothing is downloaded here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
