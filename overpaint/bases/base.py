"""What a base is: a diffusers folder or a single file, read tensor by tensor, known by the digest of what is in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overpaint.bases.checkpoint import (
    BrokenBase,
    TensorLocation,
    digests_of,
    open_folder,
    open_single_file,
    read_tensors,
)
from overpaint.bases.hub import HubId, cached, snapshot
from overpaint.bases.layout import Layout, SingleFile, TextInput, UnknownLayout, read_extras, read_index
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.pipelines import absent_components, check_configuration, load_pipeline, mended_index
from overpaint.bases.safetensors_file import DTYPES, FLOATS, SafetensorsFile, dtype_name, file_stamp
from overpaint.core.atomic import write_over
from overpaint.core.encoding import combined_digest, json_digest
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.core.executors import machine_name
from overpaint.core.names import typed_path
from overpaint.core.reporting import Progress, silent

__all__ = ["EMBEDDED_BASES", "EMOJI", "Base", "BrokenBase", "TensorLocation"]

EMOJI = Path(__file__).parent / "emoji" / "model"
EMBEDDED_BASES = {"emoji": EMOJI, "emoji-dit": Path(__file__).parent / "emoji-dit"}
"""A small Stable Diffusion, and a small Stable Diffusion 3, a diffusion transformer."""


class Unchangeable(OverpaintError):
    """Weights of a type that no change can be added to: quantised ones."""


@dataclass(eq=False)
class Base:
    """An opened base. Nothing here changes it; tensors are read from their files when asked for.

    `places` has every weight by canonical name, `containers` the files they lie in, `variant` the suffix of a folder's
    weight files where it is not plain (fp16), `form` the way in which a single file names its keys, `hub` the id and commit
    of a base from the Hub.
    """

    path: Path
    layout: Layout
    places: dict[str, TensorLocation] = field(repr=False)
    containers: dict[Path, SafetensorsFile] = field(repr=False)
    variant: str | None = None
    form: SingleFile | None = field(default=None, repr=False)
    hub: HubId | None = None
    _digests: dict[str, str] = field(default_factory=dict, repr=False)
    _readers: dict[str, list[str]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, source: Path | str) -> Base:
        """Open a diffusers folder, a single-file checkpoint, a model on the Hub (`ORG/MODEL`, `ORG/MODEL@REVISION`, where
        no file or folder has that name), or an embedded base by its name, `emoji` or `emoji-dit`.

        Raises OverpaintError for a base that is missing, unknown, incomplete or damaged.
        """
        path = EMBEDDED_BASES.get(str(source)) or typed_path(source)
        hub = HubId.parse(str(source))
        if hub is not None and not path.exists():
            path, hub = snapshot(hub)
        else:
            hub = None
        resolved = open_single_file(path) if path.is_file() else open_folder(path)
        containers = {part.container.path: part.container for part in resolved.parts}
        base = cls(path, resolved.layout, resolved.places(), containers, resolved.variant, resolved.form, hub)
        base._check()
        return base

    def _check(self) -> None:
        """Raise UnknownLayout for a denoiser of other channels, whatever container it comes in; BrokenBase for a text input
        without its projection."""
        _ = self.pipeline_class
        for name in self.text_inputs if self.layout.is_caught else ():
            if not self.projections(name):
                raise BrokenBase(
                    f"the base at {self.path} has no {self.text_input(name).projections[0]}, by which {name} enters it; get the "
                    "base again, or describe its architecture as docs/adding-a-layout.md says"
                )

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
        return read_tensors({name: self.places[name] for name in names}, self.containers)

    def digests(self, names: Iterable[str], progress: Progress = silent) -> dict[str, str]:
        """The digest of each named tensor; computed once per opened base."""
        wanted = list(names)
        missing = {name: self.places[name] for name in wanted if name not in self._digests}
        self._digests.update(digests_of(missing, self.containers, progress=progress))
        return {name: self._digests[name] for name in wanted}

    @property
    def source(self) -> str:
        """By what this base is opened again: its path, its id on the Hub with the commit, or the name of an embedded base."""
        embedded = {path: name for name, path in EMBEDDED_BASES.items()}
        return embedded.get(self.path) or str(self.hub or self.path)

    def check_digests(self, names: Iterable[str]) -> None:
        """Hash tensors anew, whatever is known of them. Raises BrokenBase for one that is not what its digest says."""
        known = self.digests(names)
        fresh = digests_of({name: self.places[name] for name in known}, self.containers)
        if changed := [name for name in known if fresh[name] != known[name]]:
            raise BrokenBase(
                f"{self.places[changed[0]].file} changed since the base was fingerprinted ({changed[0]} is another); "
                "open the base again"
            )

    def _stamps(self) -> list[list[str | int]]:
        """What changes when a weight file does, as the files were when they were opened."""
        return [[str(file), *self.containers[file].stamp] for file in sorted(self.containers)]

    def save_digests(self, cache: Path) -> None:
        """Write the digests known so far to a file that `load_digests` reads while the weight files are the same."""
        content = {"stamp": self._stamps(), "digests": self._digests}
        text = json.dumps({**content, "check": json_digest(content)}).encode()
        with suppress(OSError):  # only time is lost: the digests are computed again
            same = all(file_stamp(file.stat()) == container.stamp for file, container in self.containers.items())
            if same and not (cache.is_file() and cache.read_bytes() == text):
                write_over(cache, text)

    def load_digests(self, cache: Path) -> None:
        """Take digests from a file that `save_digests` wrote, unless it is damaged or a weight file changed since."""
        try:
            kept = json.loads(cache.read_text("utf-8"))
            check = kept.pop("check")
            if (
                check == json_digest(kept)
                and kept["stamp"] == self._stamps()
                and kept["digests"].keys() <= self.places.keys()
            ):
                self._digests.update(kept["digests"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return

    @cached_property
    def fingerprint(self) -> str:
        """The digest of every tensor of every component, whatever files they lie in."""
        return combined_digest(self.digests(self.names))

    @property
    def text_inputs(self) -> tuple[str, ...]:
        """The ways by which a prompt enters the denoiser, in the layout's order: for SD 1.x just `text_encoder`."""
        return tuple(self.layout.text_inputs)

    def projections(self, text_input: str | None = None) -> list[str]:
        """The tensors that read a text input, or any text input: above all cross-attention keys and values.

        Raises NotFound for a text input the base lacks.
        """
        if text_input is None:
            return sorted({name for each in self.text_inputs for name in self.projections(each)})
        self.text_input(text_input)
        if text_input not in self._readers:
            self._readers[text_input] = self.layout.projections(text_input, self.names)
        return list(self._readers[text_input])

    def check_changeable(self, names: Iterable[str]) -> None:
        """Raise Unchangeable unless the named tensors are of types that a change can be added to."""
        for name in names:
            dtype = DTYPES[self.places[name].entry.dtype]
            # bitsandbytes may store its codes as if they were numbers; what they stand for lies beside them.
            has_codes = f"{name}.quant_map" in self.places
            if dtype not in FLOATS or has_codes:
                kind = "four-bit codes" if has_codes else dtype_name(dtype)
                raise Unchangeable(
                    f"{name} of the base at {self.path} is {kind}, whose steps are too coarse for the change of a "
                    "patch; use the float16 or bfloat16 model that it was made from (patches are small, and quantising can "
                    "follow the build)"
                )

    def columns(self, text_input: str, reader: str) -> slice:
        """The input columns of a projection (one of `projections(text_input)`) that read this text input."""
        spec = self.text_input(text_input)
        start = sum(self._length(self.layout.text_inputs[other].width) for other in spec.after)
        return slice(start, start + self._length(spec.width) if spec.width else self.places[reader].shape[-1])

    def text_input(self, name: str) -> TextInput:
        """The layout's description of a text input. Raises NotFound for one the base lacks."""
        if name not in self.layout.text_inputs:
            raise NotFound(
                f"{self.layout.name} bases have no text input {name!r}; known: {', '.join(self.text_inputs)}"
            )
        return self.layout.text_inputs[name]

    def _length(self, name: str) -> int:
        if name not in self.places:
            raise BrokenBase(
                f"the base at {self.path} lacks {name}, which says how wide a text embedding is; get it again"
            )
        return self.places[name].shape[0]

    def component_digest(self, component: str) -> str:
        """The digest of one component's tensors."""
        return combined_digest(self.digests(n for n in self.names if n.startswith(f"{component}/")))

    def encoder_digest(self, text_input: str) -> str:
        """The digest of all tensors that decide what a text input hands on."""
        if not self.layout.is_caught:
            return self.component_digest(self.text_input(text_input).encoder)
        components = self.layout.encoders(self.names)
        names = [name for name in self.names if name.partition("/")[0] in components or name in self.layout.norms]
        return combined_digest(self.digests(names))

    @cached_property
    def extras(self) -> dict[str, Any]:
        """What a base declares in `overpaint.json` beside its index (`read_extras`). Raises OverpaintError for what cannot be."""
        return read_extras(self.path)

    @property
    def config_folder(self) -> Path:
        """The diffusers folder with the configurations, tokenizer and scheduler of this base.

        A single file has none of them: they are read from a folder of its name beside it (`model/` for
        `model.safetensors`), or from the published folder of its layout where the Hub's local cache has it. Raises
        NotFound when neither is there, UnknownLayout when it is another architecture's.
        """
        if not self.is_single_file:
            return self.path
        assert self.form is not None
        beside = self.path.with_suffix("")
        published = self.form.configs.get(str(self.channels), self.form.config)
        for folder in (beside, cached(HubId(published))):
            if folder is not None and (folder / "model_index.json").is_file():
                check_configuration(folder, self.layout, self.channels, self.path)
                return folder
        raise NotFound(
            f"{self.path.name} holds weights alone; put the configuration (a diffusers folder, no weights needed) into "
            f"{beside}, or download {published} once"
        )

    @property
    def channels(self) -> int | None:
        """The denoiser's input channels; None where the layout does not distinguish bases by them."""
        place = self.places.get(self.layout.input)
        return place.shape[1] if place and len(place.shape) > 1 else None

    @cached_property
    def pipeline_class(self) -> str:
        """The class of diffusers that draws with this base. Raises UnknownLayout for a denoiser of other input channels."""
        if self.layout.is_caught and not self.is_single_file:
            return str(self.index["_class_name"])
        written = self.places.get(self.layout.input.replace("conv_in", "conv_out"))
        # One that reads no more channels than it writes draws from noise alone, however many its autoencoder has.
        if self.channels is None or (written is not None and written.shape[0] == self.channels):
            return self.layout.pipelines[0]
        if str(self.channels) not in self.layout.by_channels:
            known = ", ".join(f"{count} ({kind})" for count, kind in self.layout.by_channels.items())
            raise UnknownLayout(
                f"{self.layout.input} of the base at {self.path} reads {self.channels} channels; known are: {known}. Use a "
                "model of one of these kinds"
            )
        return self.layout.by_channels[str(self.channels)]

    @cached_property
    def index(self) -> dict[str, Any]:
        """What `model_index.json` says: the pipeline's class and components. Raises what `config_folder` raises."""
        return read_index(self.config_folder)

    @cached_property
    def absent_components(self) -> list[str]:
        """The optional components (a safety checker, say) that the index names and that are not there whole."""
        return absent_components(self.config_folder, self.index, self.layout, weights=not self.is_single_file)

    @property
    def mended_index(self) -> dict[str, Any]:
        """The index that a folder built from this base has."""
        return mended_index(self.index, self.layout, self.pipeline_class, self.absent_components)

    @own_torch_settings()
    def pipeline(self, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """A fresh diffusers pipeline of this base, of the class `pipeline_class`.

        It has no safety checker. Raises NotFound for a single file without configuration, BrokenBase for what diffusers
        cannot load, or would fill with random values where a weight is missing.
        """
        kind, config = self.pipeline_class, self.config_folder
        pipe = load_pipeline(kind, self.path, config, self.layout, self.absent_components, self.variant, dtype)
        for component in {name.partition("/")[0] for name in self.projections()}:
            canonical = self.layout.components[component].canonical
            needed = {f"{component}/{canonical(local)}" for local, _ in getattr(pipe, component).named_parameters()}
            if missing := sorted(needed - self.places.keys()):
                raise BrokenBase(
                    f"the base at {self.path} lacks {missing[0]}, of {len(missing)} weights that its configuration asks for; "
                    "get it again"
                )
        return pipe.to(device)


class BaseReference:
    """A base by where it is and its fingerprint: what travels to another process, which opens it once."""

    def __init__(self, base: Base) -> None:
        self.source, self.fingerprint = base.source, base.fingerprint
        self._opened: Base | None = base

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "fingerprint": self.fingerprint, "_opened": None}

    def open(self) -> Base:
        """The base. Raises OverpaintError where this machine has not the base, or another one at its place."""
        if self._opened is None:
            self._opened = _opened_here(self.source, self.fingerprint)
        return self._opened


@lru_cache(maxsize=2)
def _opened_here(source: str, fingerprint: str) -> Base:
    try:
        base = Base.open(source)
    except OverpaintError as error:
        raise BrokenBase(f"the worker on {machine_name()} has not the base: {error}") from error
    if base.fingerprint != fingerprint:
        raise BrokenBase(
            f"the worker on {machine_name()} has another base at {source}: fingerprint {base.fingerprint[:12]} instead of "
            f"{fingerprint[:12]}; copy the base there, or name it by its id on the Hub"
        )
    return base
