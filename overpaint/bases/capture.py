"""What a prompt is where it enters a denoiser: caught at its projections, as the pipeline's own code hands it over.

Diffusion transformers pad with zeros, put encoders side by side, drop instructions, mask, take means and normalise before the
first projection. None of it is written down again here. A pipeline is put together whose denoiser and VAE are on the meta
device, which takes neither weights nor memory; it is called with prompts, and as soon as every projection was handed its
text, the call ends. Where a norm stands before a projection, its weights are read: what is caught is what the projection reads.

Which embedding is which token's is found out in the same way. The call is made again with text encoders that answer with
positions, written as angles: the ratio of two neighbouring numbers survives padding, stacking, and a norm without weights.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from overpaint.bases.base import Base, BrokenBase
from overpaint.bases.checkpoint import read_tensors
from overpaint.bases.layout import PROJECTION
from overpaint.bases.loading import own_torch_settings, quiet_loading
from overpaint.core.errors import OverpaintError
from overpaint.core.safetensors_header import TensorEntry

HELD = 600 << 20
"""Bytes in float32. All of a base's text encoders together are held whole up to here."""
LARGE_MATRIX = 64 << 20
PADDING_ROWS = 4
"""So many embeddings, at equal distances, stand for all of a prompt's padding."""
HIDDEN_BYTES = 256 << 20
"""What a text encoder's hidden states may take; more prompts are encoded one after the other."""


@dataclass(frozen=True)
class Segment:
    """The tokens of one text encoder: `ids` without padding, the row of each that reached the projection, rows of padding."""

    call: int
    ids: tuple[int, ...]
    rows: Mapping[int, int]
    padding: tuple[int, ...]
    padded: int
    """How many positions `padding` stands for."""


@dataclass(frozen=True, eq=False)
class CaughtPrompt:
    """What one projection reads of one prompt: float32 [rows, d], in segments; one row without any where it is pooled."""

    embeddings: Tensor
    segments: tuple[Segment, ...]


@dataclass
class _Call:
    """One call of a text encoder: its name, the token ids [n, length], and what it answered."""

    encoder: str
    ids: Tensor
    answer: Any
    first_slot: int = 0

    @property
    def slots(self) -> int:
        return self.ids.numel()


class _AllCaught(Exception):
    """Every projection was handed its text: the rest of the denoiser is not needed."""


class _MetaWins(TorchFunctionMode):
    """Where one operand is on the meta device, the others are as good as there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to and args[0].is_meta:
            dtypes = [each for each in (*args[1:], *kwargs.values()) if isinstance(each, torch.dtype)]
            return func(args[0], dtypes[0]) if dtypes else args[0]
        if any(each.is_meta for each in _tensors((args, kwargs))):
            args, kwargs = _mapped((args, kwargs), lambda each: each if each.is_meta else each.to("meta"))
        return func(*args, **kwargs)


@dataclass(eq=False)
class CapturingPipeline:
    """A base's pipeline without weights but for its text encoders, and the projections at which prompts are caught.

    `projections` are the denoiser's modules by text input, `norms` the parameters before them with their values.
    """

    base: Base
    pipe: Any
    denoiser: nn.Module
    projections: Mapping[str, nn.Module]
    encoders: Mapping[str, nn.Module]
    norms: Mapping[nn.Parameter, Tensor]
    arguments: Mapping[str, Any]
    _caught: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _masks: list[Tensor] = field(default_factory=list, repr=False)

    @classmethod
    @own_torch_settings()
    def of(cls, base: Base, device: torch.device | str = "cpu") -> CapturingPipeline:
        """Raises BrokenBase for a base without one of its text encoders or text inputs, NotFound for unknown projections."""
        with quiet_loading():
            encoders = {
                name: _text_model(base, name, torch.device(device)) for name in base.layout.encoders(base.names)
            }
            pipe = _without_weights(base, encoders, torch.device(device))
        places = {name: base.projections(name)[0].removesuffix(".weight").partition("/") for name in base.text_inputs}
        (component,) = {component for component, _, _ in places.values()}
        denoiser = getattr(pipe, component)
        projections = {name: denoiser.get_submodule(path) for name, (_, _, path) in places.items()}
        norms = _norms(base, denoiser, component)
        arguments = {**base.layout.arguments, "num_inference_steps": 1}
        if (length := prompt_length(base, type(pipe))) is not None:
            arguments["max_sequence_length"] = length
        found = cls(base, pipe, denoiser, projections, encoders, norms, arguments)
        found._install()
        return found

    @property
    def length(self) -> int | None:
        """Tokens in a prompt, where the pipeline has a setting for it."""
        return self.arguments.get("max_sequence_length")

    def prompts_at_a_time(self) -> int:
        """As many as let hidden states of all layers fit into `HIDDEN_BYTES`."""
        size = 0
        for encoder in self.encoders.values():
            config: Any = encoder.config
            config = getattr(config, "text_config", config)
            width = int(getattr(config, "hidden_size", 0) or config.d_model)
            size += 4 * width * (self.length or 77) * (4 if _is_t5(config) else layer_count(encoder) + 1)
        return max(1, min(16, HIDDEN_BYTES // size))

    @own_torch_settings()
    @torch.no_grad()
    def catch(self, prompts: Sequence[str]) -> list[dict[str, CaughtPrompt]]:
        """What every text input reads of each prompt."""
        calls: list[_Call] = []
        with self._listening(calls):
            self._call(prompts)
        caught, masks = dict(self._caught), list(self._masks)
        slots = 0
        for call in calls:
            call.first_slot, slots = slots, slots + call.slots
        with self._answering(calls, slots), self._plain_norms():
            self._call(prompts)
        traced = dict(self._caught)
        found: list[dict[str, CaughtPrompt]] = [{} for _ in prompts]
        for name, embeddings in caught.items():
            self._check_width(name, embeddings)
            embeddings = embeddings[..., self.base.columns(name, self.base.projections(name)[0])]
            for each, one in zip(
                found, self._sorted(embeddings, traced[name], calls, slots, masks, len(prompts)), strict=True
            ):
                each[name] = one
        return found

    def _call(self, prompts: Sequence[str]) -> None:
        self._caught.clear()
        self._masks.clear()
        with torch.random.fork_rng(devices=[]), quiet_loading():
            try:
                self.pipe(prompt=list(prompts), **self.arguments)
            except _AllCaught:
                return
        lacking = sorted(self.projections.keys() - self._caught.keys())
        raise BrokenBase(
            f"the pipeline of {self.base.path} handed no text to {', '.join(lacking)}; its layout names another"
        )

    def _check_width(self, name: str, embeddings: Tensor) -> None:
        projection = self.base.projections(name)[0]
        shape = self.base.places[projection].shape
        if embeddings.shape[-1] != shape[-1]:
            raise BrokenBase(
                f"{projection} of the base at {self.base.path} has shape {list(shape)}, and its text encoders give it embeddings "
                f"of width {embeddings.shape[-1]}: they are not of one model; get the base again"
            )

    def _install(self) -> None:
        for name, module in self.projections.items():
            module.register_forward_pre_hook(functools.partial(self._catch_input, name))
        inner = self.denoiser.forward

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._masks[:] = [value for key, value in kwargs.items() if "mask" in key and isinstance(value, Tensor)]
            with _MetaWins():
                return inner(*args, **kwargs)

        self.denoiser.forward = forward

    def _catch_input(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self._caught.setdefault(name, args[0].detach().float())
        if self._caught.keys() == self.projections.keys():
            raise _AllCaught
        return (args[0].to("meta"), *args[1:])

    @contextmanager
    def _listening(self, calls: list[_Call]) -> Iterator[None]:
        """Within the block, the calls of text encoders are noted."""
        handles = []
        for name, encoder in self.encoders.items():

            def note(module: Any, args: Any, kwargs: Any, answer: Any, name: str = name) -> None:
                calls.append(_Call(name, args[0] if args else kwargs["input_ids"], answer))

            handles.append(encoder.register_forward_hook(note, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _answering(self, calls: Sequence[_Call], slots: int) -> Iterator[None]:
        """Within the block, text encoders answer the same calls with the positions of tokens instead of what they mean."""
        left = list(calls)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return _positions(left.pop(0), slots)

        for encoder in self.encoders.values():
            encoder.__dict__["forward"] = functools.wraps(type(encoder).forward)(forward)
        try:
            yield
        finally:
            for encoder in self.encoders.values():
                del encoder.__dict__["forward"]

    @contextmanager
    def _plain_norms(self) -> Iterator[None]:
        """Within the block, norms before projections have no weights, so that angles pass them."""
        for parameter in self.norms:
            parameter.data.fill_(1.0)
        try:
            yield
        finally:
            for parameter, values in self.norms.items():
                parameter.data.copy_(values)

    def _sorted(
        self,
        embeddings: Tensor,
        traced: Tensor,
        calls: Sequence[_Call],
        slots: int,
        masks: Sequence[Tensor],
        count: int,
    ) -> Iterator[CaughtPrompt]:
        """The rows of each prompt, in segments; those that the denoiser's attention leaves out are left out."""
        rows, length = embeddings.reshape(-1, embeddings.shape[-1]), embeddings.shape[-2]
        if len(rows) == count:
            yield from (CaughtPrompt(row[None].clone(), ()) for row in rows)
            return
        read = rows.abs().amax(1) > 0
        for mask in masks:
            if embeddings.ndim == 3 and mask.ndim == 2 and len(mask) == count and mask.shape[1] >= length:
                read &= (mask[:, :length] != 0).reshape(-1).to(read.device)
        slot_of = _decoded(traced.reshape(-1, traced.shape[-1]), slots).tolist()
        row_of: dict[int, int] = {}
        for row in read.nonzero()[:, 0].tolist():
            if slot_of[row] >= 0:
                row_of.setdefault(slot_of[row], row)
        for number in range(count):
            yield self._one(rows, row_of, calls, number)

    def _one(self, rows: Tensor, row_of: Mapping[int, int], calls: Sequence[_Call], number: int) -> CaughtPrompt:
        chosen: list[int] = []
        segments = []
        for index, call in enumerate(calls):
            ids = call.ids[number].tolist()
            start, stop = self._tokens(call.encoder, ids)
            first = call.first_slot + number * len(ids)
            token_rows, padding = {}, []
            for position in range(len(ids)):
                row = row_of.get(first + position)
                if row is None:
                    continue
                if start <= position < stop:
                    token_rows[position - start] = len(chosen)
                    chosen.append(row)
                else:
                    padding.append(row)
            if not token_rows and not padding:
                continue
            spread = [
                padding[i * (len(padding) - 1) // max(1, PADDING_ROWS - 1)] for i in range(PADDING_ROWS) if padding
            ]
            spread = list(dict.fromkeys(spread))
            ends = tuple(range(len(chosen), len(chosen) + len(spread)))
            chosen += spread
            segments.append(Segment(index, tuple(ids[start:stop]), token_rows, ends, len(padding)))
        return CaughtPrompt(rows[chosen], tuple(segments))

    def _tokens(self, encoder: str, ids: Sequence[int]) -> tuple[int, int]:
        """Where the tokens of a prompt begin and end; before and after them is padding."""
        tokenizer = tokenizer_of(self.pipe, encoder)
        pad, start, stop = tokenizer.pad_token_id, 0, len(ids)
        while stop > 0 and ids[stop - 1] == pad:
            stop -= 1
        while start < stop and ids[start] == pad:
            start += 1
        # CLIP pads with the token that ends a prompt.
        return start, min(len(ids), stop + 1) if pad == tokenizer.eos_token_id and stop < len(ids) else stop


def tokenizer_of(pipe: Any, encoder: str) -> Any:
    """The tokenizer of a text encoder: that with the same number behind its name; a processor's own."""
    found = getattr(pipe, encoder.replace("text_encoder", "tokenizer"))
    return getattr(found, "tokenizer", found)


def signature_default(kind: type, argument: str) -> Any:
    """The default of an argument of a pipeline's call, None where it has no such argument."""
    found = inspect.signature(kind.__call__).parameters.get(argument)
    return None if found is None else found.default


def prompt_length(base: Base, kind: type) -> int | None:
    """Tokens that a pipeline of a base reads of a prompt: the base's own setting, else its default; None without a limit."""
    extent = signature_default(kind, "max_sequence_length")
    return None if extent is None else int(base.extras.get("prompt_length", extent))


def layer_count(encoder: nn.Module) -> int:
    """How many layers a text encoder has."""
    return len(_layers(encoder)[1])


def _is_t5(config: Any) -> bool:
    return "t5" in str(getattr(config, "model_type", ""))


def _positions(call: _Call, slots: int) -> Any:
    """A text encoder's answer with each embedding replaced by its position, as an angle; anything pooled is zero."""
    count, length = call.ids.shape
    angles = 2 * math.pi * (torch.arange(call.slots, dtype=torch.float64) + call.first_slot + 0.5) / slots
    known: dict[tuple[int, ...], Tensor] = {}

    def replaced(answer: Tensor) -> Tensor:
        shape = tuple(answer.shape)
        if not answer.is_floating_point() or len(shape) < 2:
            return answer
        if shape not in known:
            known[shape] = answer.new_zeros(shape)
            by_token = angles.reshape(count, length)
            if shape[:2] == (length, count) and shape[:2] != (count, length):
                by_token = by_token.T
            if len(shape) == 3 and shape[:2] == tuple(by_token.shape):
                known[shape][..., 0::2] = by_token.cos()[..., None].to(answer)
                known[shape][..., 1::2] = by_token.sin()[..., None].to(answer)
        return known[shape]

    return _mapped(call.answer, replaced)


def _decoded(rows: Tensor, slots: int) -> Tensor:
    """The slot of each row, -1 for one that no token has."""
    cosine, sine = rows[:, 0].double(), rows[:, 1].double()
    found = (torch.atan2(sine, cosine).remainder(2 * math.pi) * slots / (2 * math.pi)).floor().long()
    return torch.where((cosine == 0) & (sine == 0), -1, found.clamp(0, slots - 1)).cpu()


def _norms(base: Base, denoiser: nn.Module, component: str) -> dict[nn.Parameter, Tensor]:
    """Make real what stands before projections."""
    found = {}
    for name in base.layout.norms:
        path, _, attribute = name.partition("/")[2].rpartition(".")
        if name.startswith(f"{component}/"):
            if name not in base.places:
                raise BrokenBase(f"the base at {base.path} lacks {name}, which normalises a prompt; get it again")
            values = base.tensor(name).float()
            parameter = nn.Parameter(values.clone(), requires_grad=False)
            denoiser.get_submodule(path).register_parameter(attribute, parameter)
            found[parameter] = values
    return found


# A pipeline without weights.


def _without_weights(base: Base, encoders: Mapping[str, nn.Module], device: torch.device) -> Any:
    """The pipeline, its tokenizers and scheduler loaded, its denoisers and VAE on the meta device, nothing else."""
    import diffusers

    # A pipeline that inpaints or follows instructions hands on text as its family's first one does, which asks for no picture.
    kind = getattr(diffusers, base.layout.pipelines[0])
    parts: dict[str, Any] = {}
    for name, value in base.index.items():
        if name.startswith("_") or name not in inspect.signature(kind.__init__).parameters:
            continue
        if not isinstance(value, list):
            parts[name] = value
        elif value[0] is None or name in ("image_encoder", "feature_extractor"):
            parts[name] = None
        elif name in encoders:
            parts[name] = encoders[name]
        else:
            parts[name] = _part(base.config_folder / name, component_class(value))
    own = {"_execution_device": property(lambda self: device), "device": property(lambda self: device)}
    pipe = type(kind.__name__, (kind,), own)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _part(folder: Path, kind: Any) -> Any:
    if not issubclass(kind, nn.Module):
        return kind.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        return kind.from_config(kind.load_config(folder, local_files_only=True)).requires_grad_(False).eval()


def component_class(entry: Sequence[str]) -> Any:
    """The class of `["transformers", "T5EncoderModel"]` or the like. Raises BrokenBase for one that would be a program's own."""
    import diffusers
    import transformers

    library, name = entry
    homes: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    if library not in homes and hasattr(diffusers.pipelines, library):
        homes[library] = importlib.import_module(f"diffusers.pipelines.{library}")
    home = homes.get(library)
    found = getattr(home, name, None) or getattr(home, name.removesuffix("Fast"), None)
    if found is None:
        raise BrokenBase(
            f"the base asks for {library[:80]}.{name[:80]}, which is no class of diffusers or transformers; code that comes with "
            "a model is never run: use a folder that names a class of theirs"
        )
    return found


# Text encoders with the weights of a base, held whole, or with one layer at a time read from its files.


def _text_model(base: Base, component: str, device: torch.device) -> Any:
    kind = component_class(base.index[component])
    rules = base.layout.components[component]
    config = kind.config_class.from_pretrained(base.config_folder / component, local_files_only=True)
    with _parameters_on_meta():
        model = kind(config).requires_grad_(False).eval()
    if hasattr(model, "lm_head"):
        model.lm_head = nn.Identity()  # nobody reads what it would say of 150,000 tokens
    ties = getattr(model, "all_tied_weights_keys", {})
    names = {
        key: f"{component}/{rules.canonical(ties.get(key, key))}"
        for key, _ in model.named_parameters(remove_duplicate=False)
    }
    names = {key: name for key, name in names.items() if not rules.is_unread(name.partition("/")[2])}
    if lacking := sorted(set(names.values()) - base.places.keys()):
        raise BrokenBase(f"the base at {base.path} lacks {lacking[0]}, without which no prompt is read; get it again")
    whole = device.type != "cpu" or _size(base) <= HELD
    streamed = {} if whole else _streamed(base, model, names)
    held = {key: name for key, name in names.items() if key not in streamed}
    values = base.tensors(sorted(set(held.values())))
    for key, name in held.items():
        _put(model, key, values[name].float().to(device))
    return model.to(device) if whole and not _has_meta(model) else model


def _has_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _size(base: Base) -> int:
    return sum(
        4 * math.prod(place.shape)
        for name, place in base.places.items()
        if name.split("/")[0] in base.layout.encoders(base.names)
    )


def _streamed(base: Base, model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Let layers and large matrices of embeddings be read when they are used; what is read so."""
    path, layers = _layers(model)
    found: dict[str, str] = {}
    # Pipelines send tokens to where a model's first parameter is; this one is never on the meta device.
    model.register_parameter("first", nn.Parameter(torch.empty(0), requires_grad=False))
    for number, layer in enumerate(layers):
        start = f"{path}.{number}."
        part = {key.removeprefix(start): name for key, name in names.items() if key.startswith(start)}
        found.update({f"{start}{key}": name for key, name in part.items()})
        layer.register_forward_pre_hook(
            functools.partial(_load, base.containers, {k: base.places[n] for k, n in part.items()})
        )
        layer.register_forward_hook(functools.partial(_drop, tuple(part)), always_call=True)
    for where, module in model.named_modules(remove_duplicate=False):
        key = f"{where}.weight"
        if isinstance(module, nn.Embedding) and key in names and key not in found:
            place = base.places[names[key]]
            if 4 * math.prod(place.shape) >= LARGE_MATRIX and not place.transposed:
                module.register_forward_pre_hook(
                    functools.partial(_load_rows, base.containers[place.file], place.entry)
                )
                module.register_forward_hook(functools.partial(_drop, ("weight",)), always_call=True)
                found[key] = names[key]
    return found


def _layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The layers that read text: the list with the most parameters, and where it is."""
    lists = [
        (path, each) for path, each in model.named_modules() if isinstance(each, nn.ModuleList) and "vis" not in path
    ]
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _load(containers: Any, places: Any, module: nn.Module, args: Any) -> None:
    for key, stored in read_tensors(places, containers):
        _put(module, key, stored.float())


def _drop(keys: Sequence[str], module: nn.Module, args: Any, answer: Any) -> None:
    for key in keys:
        holder, _, attribute = key.rpartition(".")
        parameters = module.get_submodule(holder)._parameters
        gone: Any = parameters[attribute]
        parameters[attribute] = nn.Parameter(gone.to("meta"), requires_grad=False)


def read_rows(container: Any, entry: TensorEntry, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of a matrix in a file, the rows of some tokens, and which of these is whose."""
    unique, which = tokens.unique(return_inverse=True)
    size = entry.size // entry.shape[0]
    rows = {
        str(row): TensorEntry(entry.dtype, entry.shape[1:], entry.start + row * size, size) for row in unique.tolist()
    }
    # They come in the order of the file, which is that of `unique`.
    return torch.stack([row for _, row in container.read(rows)]).float(), which


def _load_rows(container: Any, entry: TensorEntry, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    rows, which = read_rows(container, entry, args[0])
    _put(module, "weight", rows)
    module.padding_idx = None  # type: ignore[assignment]
    return (which, *args[1:])


def _put(model: nn.Module, key: str, values: Tensor) -> None:
    holder, _, attribute = key.rpartition(".")
    model.get_submodule(holder)._parameters[attribute] = nn.Parameter(values, requires_grad=False)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within the block, new modules have their parameters on the meta device; buffers, which are computed, are real."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: Any) -> None:
        register(self, name, param if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _mapped(value: Any, change: Any) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        items = {key: _mapped(each, change) for key, each in value.items()}
        return items if type(value) is dict else type(value)(**items)
    if isinstance(value, list | tuple):
        parts = [_mapped(each, change) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


# What solvers ask of a text input.

MEMORY = 256 << 20
"""Bytes of embeddings that are kept for all text inputs of a base."""
SAMPLED_WORDS, LARGE = 256, 1_000_000_000
"""Of the vocabulary of an encoder of so many parameters, so many words at equal distances stand for all."""
_PROBES = ("a photo of it", "a photo of us", "")


class PromptTooLong(OverpaintError):
    """A concept whose tokens lie past the end of what the text encoder reads."""


class CaughtPrompts:
    """The newest prompts that were caught. Which ones are encoded together follows from the request alone, and so do the bits."""

    def __init__(self, pipeline: CapturingPipeline) -> None:
        self.pipeline = pipeline
        self._known: OrderedDict[tuple[str, ...], list[dict[str, CaughtPrompt]]] = OrderedDict()
        self._nbytes = 0

    def of(self, prompts: Sequence[str]) -> dict[str, dict[str, CaughtPrompt]]:
        """What every text input reads of each prompt, by prompt and text input."""
        unique, count = list(dict.fromkeys(prompts)), self.pipeline.prompts_at_a_time()
        found: dict[str, dict[str, CaughtPrompt]] = {}
        for start in range(0, len(unique), count):
            chunk = tuple(unique[start : start + count])
            if chunk not in self._known:
                self._keep(chunk, self.pipeline.catch(chunk))
            self._known.move_to_end(chunk)
            found.update(zip(chunk, self._known[chunk], strict=True))
        return found

    def _keep(self, chunk: tuple[str, ...], caught: list[dict[str, CaughtPrompt]]) -> None:
        self._known[chunk] = caught
        self._nbytes += _nbytes(caught)
        while self._nbytes > MEMORY and len(self._known) > 1:
            self._nbytes -= _nbytes(self._known.popitem(last=False)[1])

    @cached_property
    def probes(self) -> tuple[dict[str, CaughtPrompt], ...]:
        """Two prompts that differ in their ends, and the empty one."""
        caught = self.of(_PROBES)
        return tuple(caught[prompt] for prompt in _PROBES)


def _nbytes(caught: Sequence[Mapping[str, CaughtPrompt]]) -> int:
    return sum(each.embeddings.nbytes for one in caught for each in one.values())


@dataclass(eq=False)
class PipelineTextInput:
    """One text input of a base whose prompts are caught. All inputs of a base share one pipeline and what it caught."""

    name: str
    source: CaughtPrompts
    output: str = PROJECTION
    group: str = "pipeline"

    @property
    def _pipeline(self) -> CapturingPipeline:
        return self.source.pipeline

    @property
    def tokenizer(self) -> Any:
        return tokenizer_of(self._pipeline.pipe, self._pipeline.base.text_input(self.name).encoder)

    @property
    def device(self) -> torch.device:
        """Where embeddings are computed."""
        found: torch.device = self._pipeline.pipe.device
        return found

    @cached_property
    def is_pooled(self) -> bool:
        """Whether a prompt is one embedding rather than one per token."""
        return not self.source.probes[0][self.name].segments

    @property
    def width(self) -> int:
        """Numbers in one embedding, d."""
        columns = self._pipeline.base.columns(self.name, self._pipeline.base.projections(self.name)[0])
        return int(columns.stop - columns.start)

    @property
    def length(self) -> int:
        """Tokens that are read of a prompt."""
        limit = self._pipeline.length or self.tokenizer.model_max_length
        return int(min(limit, self.tokenizer.model_max_length))

    @cached_property
    def begin(self) -> Tensor | None:
        """The embedding with which every prompt begins, float64 [d]; None where there is none that is always the same."""
        first, _, empty = (probe[self.name] for probe in self.source.probes)
        for one, other in zip(first.segments[:1], empty.segments[:1], strict=True):
            if self._is_causal(one.call) and one.ids[:1] == other.ids[:1] and 0 in one.rows and 0 in other.rows:
                return empty.embeddings[other.rows[0]].double()
        return None

    def _is_causal(self, call: int) -> bool:
        """Whether what a text encoder makes of a token does not depend on what follows it."""
        if call not in self._causal:
            prompts = [probe[self.name] for probe in self.source.probes[:2]]
            one, other = (next(s for s in prompt.segments if s.call == call) for prompt in prompts)
            shared = _common_prefix(one.ids, other.ids)
            rows = [(one.rows[i], other.rows[i]) for i in range(shared) if i in one.rows and i in other.rows]
            a, b = (prompt.embeddings[[pair[i] for pair in rows]] for i, prompt in enumerate(prompts))
            self._causal[call] = bool(rows) and float((a - b).norm()) <= 1e-4 * float(a.norm())
        return self._causal[call]

    @cached_property
    def _causal(self) -> dict[int, bool]:
        return {}

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text without begin, end and padding."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return found

    def first_position(self, template: str, word: str) -> int:
        """Always 0, for all positions count. Raises PromptTooLong when the word would be cut off."""
        if len(self.tokens(template.partition("{}")[0] + word)) >= self.length:
            raise PromptTooLong(
                f"{word!r} in {template!r} ends past the {self.length} tokens this text encoder reads; use a shorter name"
            )
        return 0

    def words(self) -> list[str]:
        """Whole words of the tokenizer's vocabulary, sorted; a sample of them where encoding them all would take days."""
        vocabulary = self.tokenizer.get_vocab()
        whole = {token.removesuffix("</w>") for token in vocabulary if token.endswith("</w>")}
        whole = whole or {token[1:] for token in vocabulary if token[:1] in ("▁", "Ġ")}  # SentencePiece, byte-level BPE
        known = sorted(word for word in whole if len(word) > 1 and word.isalpha() and word.isascii() and word.islower())
        parameters = sum(p.numel() for encoder in self._pipeline.encoders.values() for p in encoder.parameters())
        count = min(len(known), SAMPLED_WORDS) if parameters > LARGE else len(known)
        return [known[i * len(known) // count] for i in range(count)]

    def hidden(self, prompts: Sequence[str]) -> list[Tensor]:
        """What the projection reads of each prompt, float32 [rows, d]: its tokens, and some positions for its padding."""
        caught = self.source.of(prompts)
        return [caught[prompt][self.name].embeddings for prompt in prompts]

    def keys_and_values(
        self, pairs: Sequence[tuple[str, str]], padding: float, *, own: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Weighted embeddings of both prompts of each pair, where the first differs from the second: float64 [d, m] each.

        Token by token: what is before the first difference, what is behind the last one, what is between them, and padding,
        which weighs as much as `padding` tokens at most. A prompt weighs 1. Where tokens depend on later ones, it differs
        everywhere; so does one that is paired with itself. Without its `own`, what is between the first and the last
        difference is left out, and a prompt that has nothing else, too.
        """
        caught = self.source.of([prompt for pair in pairs for prompt in pair])
        nothing = torch.zeros(0, self.width, dtype=torch.float64, device=self.device)
        keys, values = [nothing], [nothing]
        for prompt, other in pairs:
            a, b = caught[prompt][self.name], caught[other][self.name]
            rows = self._lined_up(a, b, padding, own)
            roots = torch.tensor([weight for _, _, weight in rows], dtype=torch.float64).sqrt()[:, None].to(self.device)
            keys.append(a.embeddings[[row for row, _, _ in rows]].double() * roots)
            values.append(b.embeddings[[row for _, row, _ in rows]].double() * roots)
        return torch.cat(keys).T, torch.cat(values).T

    def last_keys_and_values(self, pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """The last token in which each prompt differs from the other, and its counterpart: float64 [d, m] each.

        Without a counterpart, it is the token before; where there is none before, the one that follows.
        """
        caught = self.source.of([prompt for pair in pairs for prompt in pair])
        rows = [row for a, b in pairs for row in _last_rows(caught[a][self.name], caught[b][self.name])]
        return torch.stack([k for k, _ in rows], 1).double(), torch.stack([v for _, v in rows], 1).double()

    def _lined_up(self, a: CaughtPrompt, b: CaughtPrompt, padding: float, own: bool) -> list[tuple[int, int, float]]:
        """Rows of two prompts that answer each other, with weights that make 1 together; segments weigh the same."""
        if self.is_pooled:
            return [(0, 0, 1.0)]
        others = {segment.call: segment for segment in b.segments}
        found = []
        for segment in a.segments:
            if rows := self._lined_up_in(segment, others.get(segment.call), a is b, padding, own):
                total = sum(weight for _, _, weight in rows)
                found.append([(row, other, weight / total) for row, other, weight in rows])
        if not found and own:
            raise PromptTooLong(
                f"two prompts that differ past the end of what {self.name} reads are the same to it; use shorter ones"
            )
        return [(row, other, weight / len(found)) for rows in found for row, other, weight in rows]

    def _lined_up_in(
        self, one: Segment, other: Segment | None, whole: bool, padding: float, own: bool
    ) -> list[tuple[int, int, float]]:
        if other is None:
            return []
        before = _common_prefix(one.ids, other.ids)
        start = before if self._is_causal(one.call) and not whole else 0
        end = len(one.ids) - _common_suffix(one.ids, other.ids, before)
        chosen = {i: row for i, row in one.rows.items() if i >= start and (own or not before <= i < end)}
        rows = [
            (row, other.rows[target], 1.0)
            for index, row in chosen.items()
            if (target := _counterpart(index, one.ids, other.ids, before)) in other.rows
        ]
        share = min(padding, one.padded) / max(1, len(one.padding))
        if other.padding:
            rows += [(row, other.padding[min(i, len(other.padding) - 1)], share) for i, row in enumerate(one.padding)]
        return rows


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))


def _common_suffix(a: Sequence[int], b: Sequence[int], before: int) -> int:
    return min(_common_prefix(a[::-1], b[::-1]), len(a) - before, len(b) - before)


def _counterpart(index: int, ids: Sequence[int], other: Sequence[int], before: int) -> int:
    """The index in `other` of the token that stands where `ids` has one."""
    after = _common_suffix(ids, other, before)
    middle, theirs = len(ids) - before - after, len(other) - before - after
    if index < before:
        return index
    if index >= len(ids) - after:
        return len(other) - len(ids) + index
    return min(before + (index - before) * theirs // middle, len(other) - 1)


def _last_rows(a: CaughtPrompt, b: CaughtPrompt) -> Iterator[tuple[Tensor, Tensor]]:
    """The embeddings of the last token that differs, and of its counterpart, in each segment."""
    if not a.segments:
        yield a.embeddings[0], b.embeddings[0]
    others = {segment.call: segment for segment in b.segments}
    for one in a.segments:
        other = others[one.call]
        before = _common_prefix(one.ids, other.ids)
        after = _common_suffix(one.ids, other.ids, before)
        last, target = len(one.ids) - after - 1, max(0, len(other.ids) - after - 1)
        if last in one.rows and target in other.rows:
            yield a.embeddings[one.rows[last]], b.embeddings[other.rows[target]]
