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
import inspect
import math
import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from overpaint.bases.base import Base, BrokenBase
from overpaint.bases.encoder_models import component_class, feed_forward_output, layers_of, text_model, watched
from overpaint.bases.loading import own_torch_settings, quiet_loading
from overpaint.bases.pipelines import class_of_diffusers, loading

PADDING_ROWS = 4
"""So many embeddings, at equal distances, stand for all of a prompt's padding."""
ANGLES = 64
"""Of a row at least so many places, at equal distances, are asked whose tokens they have, if it has as many."""
PROBE = "a photo of it"
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
    """What one projection, or a matrix inside of a text encoder, reads of one prompt: float32 [rows, d], in segments; one
    row without any where it is pooled."""

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
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    """Held while prompts are caught: what is noted meanwhile is noted in this object and its modules."""
    _caught: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _masks: list[Tensor] = field(default_factory=list, repr=False)

    @classmethod
    @own_torch_settings()
    def of(cls, base: Base, device: torch.device | str = "cpu") -> CapturingPipeline:
        """Raises BrokenBase for a base without one of its text encoders or text inputs, NotFound for unknown projections."""
        # One that inpaints or follows instructions hands on text as its family's first one does, which asks for no picture.
        kind = class_of_diffusers(base.layout.pipelines[0])
        encoders = {name: text_model(base, name, torch.device(device)) for name in base.layout.encoders(base.names)}
        with loading("the pipeline", base.path):
            pipe = _without_weights(base, kind, encoders, torch.device(device))
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
        """As many as let what is computed of them fit into `HIDDEN_BYTES`: the hidden states of all layers; of T5, which keeps
        none, one layer's attention, four times as it is computed, and what is between the halves of its feed-forward part."""
        size, length = 0, self.length or 77
        for encoder in self.encoders.values():
            config: Any = encoder.config
            config = getattr(config, "text_config", config)
            width = int(getattr(config, "hidden_size", 0) or config.d_model)
            numbers = width * (len(layers_of(encoder)) + 1)
            if "t5" in str(getattr(config, "model_type", "")):
                numbers = 4 * width + 4 * config.num_heads * length + 3 * config.d_ff
            size += 4 * length * numbers
        return max(1, min(16, HIDDEN_BYTES // size))

    @own_torch_settings()
    @torch.no_grad()
    def catch(
        self, prompts: Sequence[str], layers: Mapping[str, int] = MappingProxyType({})
    ) -> list[dict[str, CaughtPrompt]]:
        """What every text input reads of each prompt; instead, where text encoders are named with one of their `layers`, what is
        inside of these, under `COMPONENT/FEED_FORWARD` and `COMPONENT/LAYER` (`encoder_models`)."""
        calls: list[_Call] = []
        inside: dict[str, list[Tensor]] = {}
        with self._listening(calls), self._watching(layers, inside):
            self._call(prompts)
        caught, masks = dict(self._caught), list(self._masks)
        slots = 0
        for call in calls:
            call.first_slot, slots = slots, slots + call.slots
        with self._answering(calls, slots), self._plain_norms():
            self._call(prompts)
        traced = dict(self._caught)
        found: list[dict[str, CaughtPrompt]] = [{} for _ in prompts]
        read: set[int] = set()
        for name, embeddings in caught.items():
            self._check_width(name, embeddings)
            embeddings = embeddings[..., self.base.columns(name, self.base.projections(name)[0])]
            if layers:  # text encoders may stand side by side in one row
                read |= self._slots_read(embeddings, traced[name], slots, masks, len(prompts))
                continue
            rows = embeddings.reshape(-1, embeddings.shape[-1])
            row_of = self._row_of_slot(embeddings, traced[name], slots, masks, len(prompts))
            is_pooled = len(rows) == len(prompts)
            for number, each in enumerate(found):
                if is_pooled:
                    each[name] = CaughtPrompt(rows[number][None].clone(), ())
                else:
                    each[name] = self._one(rows, row_of, calls, number)
        for name, states in inside.items():
            for each, one in zip(found, self._inside(name, states, calls, read, len(prompts)), strict=True):
                each[name] = one
        return found

    @own_torch_settings()
    @torch.no_grad()
    def deciding_layer(self, component: str) -> int:
        """The last layer of a text encoder, counted from 0, that decides all that the encoder decides of every text input.

        Found out by disturbing their feed-forward parts: pipelines read the last hidden states, earlier ones, pooled ones, or
        several, side by side.
        """
        encoder = self.encoders[component]
        with self.lock:
            as_it_is = self._disturbed(None)
            by_any = self._differing(as_it_is, self._disturbed(feed_forward_output(encoder, 0)[1]))
            for number in range(len(layers_of(encoder)) - 1, 0, -1):
                _, matrix = feed_forward_output(encoder, number)
                by_this = self._differing(as_it_is, self._disturbed(matrix))
                # A number may happen to come out as it was.
                if all((which & ~by_this[name]).sum() <= 0.01 * which.sum() for name, which in by_any.items()):
                    return number
        return 0

    def _disturbed(self, matrix: nn.Linear | None) -> dict[str, Tensor]:
        """What is caught of one prompt when noise is added to what a matrix gives."""

        def add_noise(module: nn.Module, args: Any, answer: Tensor) -> Tensor:
            random = torch.Generator().manual_seed(0)
            return answer + torch.randn(answer.shape, generator=random).to(answer) * (answer.abs().mean() + 1.0)

        handle = matrix.register_forward_hook(add_noise) if matrix is not None else None
        try:
            self._call([PROBE])
        finally:
            if handle is not None:
                handle.remove()
        return dict(self._caught)

    @staticmethod
    def _differing(caught: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By text input, in which of its columns what is caught differs."""
        return {name: (each != others[name]).flatten(0, -2).any(0) for name, each in caught.items()}

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

    @contextmanager
    def _watching(self, layers: Mapping[str, int], inside: dict[str, list[Tensor]]) -> Iterator[None]:
        """Within the block, what is inside of layers is noted, call by call."""
        handles = []
        for component, number in layers.items():

            def note(output: str, states: Tensor, component: str = component) -> None:
                inside.setdefault(f"{component}/{output}", []).append(states.detach().float())

            handles += watched(self.encoders[component], number, note)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _inside(
        self, name: str, states: Sequence[Tensor], calls: Sequence[_Call], read: Set[int], count: int
    ) -> Iterator[CaughtPrompt]:
        """What is inside of a text encoder's layer for each prompt, at the positions that text inputs read; where they read a
        pooled embedding alone, at its last token, whose state is pooled."""
        component = name.partition("/")[0]
        own = [call for call in calls if call.encoder == component]
        rows: list[Tensor] = []
        row_of: dict[int, int] = {}
        for call, each in zip(own, states, strict=True):
            slots = range(call.first_slot, call.first_slot + call.slots)
            first = sum(map(len, rows))
            by_prompt = each.transpose(0, 1) if each.shape[:2] != call.ids.shape else each
            rows.append(by_prompt.reshape(-1, each.shape[-1]))
            is_read = read & set(slots)
            for number, ids in enumerate(call.ids.tolist()):
                last = self._tokens(component, ids)[1] - 1
                for position in range(len(ids)):
                    slot = call.first_slot + number * len(ids) + position
                    if slot in is_read or (not is_read and position == last):
                        row_of[slot] = first + slot - call.first_slot
        together = torch.cat(rows)
        for number in range(count):
            yield self._one(together, row_of, calls, number)

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

    def _row_of_slot(
        self, embeddings: Tensor, traced: Tensor, slots: int, masks: Sequence[Tensor], count: int
    ) -> dict[int, int]:
        """By the slot of a token, its row among all embeddings; without those that the denoiser's attention leaves out. Empty
        where prompts are pooled."""
        row_of: dict[int, int] = {}
        slot_of = _decoded(traced.reshape(-1, traced.shape[-1]), slots).tolist()
        for row in self._rows_read(embeddings, masks, count).tolist():
            if slot_of[row] >= 0:
                row_of.setdefault(slot_of[row], row)
        return row_of

    @staticmethod
    def _rows_read(embeddings: Tensor, masks: Sequence[Tensor], count: int) -> Tensor:
        """The rows of embeddings that the denoiser's attention does not leave out; none where prompts are pooled."""
        rows, length = embeddings.reshape(-1, embeddings.shape[-1]), embeddings.shape[-2]
        if len(rows) == count:
            return torch.empty(0, dtype=torch.long)
        read = rows.abs().amax(1) > 0
        for mask in masks:
            if embeddings.ndim == 3 and mask.ndim == 2 and len(mask) == count and mask.shape[1] >= length:
                read &= (mask[:, :length] != 0).reshape(-1).to(read.device)
        return read.nonzero()[:, 0]

    def _slots_read(
        self, embeddings: Tensor, traced: Tensor, slots: int, masks: Sequence[Tensor], count: int
    ) -> set[int]:
        """The slots of tokens that are found at any of the places asked, in the rows that are read."""
        rows = traced.reshape(-1, traced.shape[-1])[self._rows_read(embeddings, masks, count).to(traced.device)]
        angles = rows[:, : rows.shape[1] // 2 * 2].unflatten(1, (-1, 2))
        angles = angles[:, :: max(1, angles.shape[1] // ANGLES)]
        return set(_decoded(angles.flatten(0, 1), slots).unique().tolist()) - {-1}

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
    return found if hasattr(found, "pad_token_id") else found.tokenizer


def prompt_length(base: Base, kind: type) -> int | None:
    """Tokens that a pipeline of a base reads of a prompt: the base's own setting, else its default; None without a limit."""
    found = inspect.signature(kind.__call__).parameters.get("max_sequence_length")
    return None if found is None or found.default is None else int(base.extras.get("prompt_length", found.default))


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


def _without_weights(base: Base, kind: Any, encoders: Mapping[str, nn.Module], device: torch.device) -> Any:
    """A pipeline of that class, its tokenizers and scheduler loaded, its denoisers and VAE on the meta device, nothing else."""
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
