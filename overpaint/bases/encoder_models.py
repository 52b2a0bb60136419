"""The text encoders of a base as models of transformers, in float32: held whole, or, where they are large, layer by layer.

Stable Diffusion XL's would take 3.3 GB. Their layers, the largest matrix by matrix, are read from the base's files each time
a batch of prompts comes by, turned into float32 where the last one lay, and of the tokens' embeddings just those are read that
the batch has. On two cores, reading costs about a twentieth of what computing costs. All ways compute the same from the same
numbers: where batches are equal, so are the bits.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from overpaint.bases.base import Base, BrokenBase
from overpaint.bases.checkpoint import TensorLocation, read_tensors
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.pipelines import loading
from overpaint.core.encoding import TensorEntry
from overpaint.core.errors import OverpaintError

HELD = 600 << 20
"""Bytes in float32. All of a base's text encoders together are held whole up to here; Stable Diffusion 1.x's has 470 MiB."""
WHOLE_LAYER = 256 << 20
"""Bytes in float32. Larger layers, as those of T5-XXL with 736 MiB, are read matrix by matrix."""
TRIM_EVERY = 4
"""Layers after which what the C library's heap keeps of freed memory is given back. It costs 8% of the time; after each, 12%."""
FEED_FORWARD, LAYER = "feed forward", "layer"
"""What is inside of a layer: what the last matrix of its feed-forward part reads, and what the layer gives."""
FEED_FORWARD_OUTPUTS = ("fc2", "wo", "down_proj", "dense_4h_to_h")
"""What CLIP, T5, Llama's and Qwen's kind, and ChatGLM call the last matrix of the feed-forward part of a layer."""
LARGE_MATRIX = 64 << 20
"""Bytes in float32 from which a matrix of embeddings is read row by row, where layers are read."""


@own_torch_settings()
def text_model(base: Base, component: str, device: torch.device) -> Any:
    """A text encoder with the weights that the base has, whatever files they lie in, ready to be used.

    What is held follows from the base and the kind of device alone, never from the memory there is. Raises BrokenBase for a
    base that lacks one of its weights, or whose configuration cannot be read.
    """
    rules = base.layout.components[component]
    with loading(component, base.path):
        kind = component_class(("transformers", rules.model) if rules.model else base.index[component])
        config = kind.config_class.from_pretrained(base.config_folder / component, local_files_only=True)
        with _parameters_on_meta():
            model = kind(config).requires_grad_(False).eval()
        if hasattr(model, "lm_head"):
            model.lm_head = nn.Identity()  # nobody reads what it would say of 150,000 tokens
        names = _names(base, component, model)
        # The memory of an accelerator is its own, and a layer would take longer to be moved there than to be used.
        is_whole = device.type != "cpu" or _size(base) <= HELD
        streamed = {} if is_whole else _streamed(base, model, names)
        held = {key: name for key, name in names.items() if key not in streamed}
        values = base.tensors(sorted(set(held.values())))
        for key, name in held.items():
            _put(model, key, values[name].float().to(device))
        # Parameters that no prompt needs have no values.
        return model._apply(lambda values: values if values.is_meta else values.to(device))


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers that read text: the list with the most parameters."""
    return _layers(model)[1]


def feed_forward_output(model: nn.Module, number: int) -> tuple[str, nn.Linear]:
    """The last matrix of the feed-forward part of a layer, counted from 0, and its path in the model.

    Raises OverpaintError for a layer without one.
    """
    path, layers = _layers(model)
    named = [
        (f"{path}.{number}.{name}", module)
        for name, module in layers[number].named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in FEED_FORWARD_OUTPUTS
    ]
    kind = type(model).__name__
    if len(named) != 1:
        raise OverpaintError(
            f"a layer of {kind} has {len(named)} matrices called {', '.join(FEED_FORWARD_OUTPUTS)}, and one is needed; choose "
            "a solver that edits what reads the prompt, such as `separable`"
        )
    return named[0]


def watched(model: nn.Module, number: int, note: Callable[[str, Tensor], object]) -> list[RemovableHandle]:
    """Hooks by which what is inside of a layer is noted, as FEED_FORWARD and as LAYER, each time that it is used."""

    def before(module: nn.Module, args: Any) -> None:
        note(FEED_FORWARD, args[0])

    def behind(module: nn.Module, args: Any, answer: Any) -> None:
        note(LAYER, answer[0] if isinstance(answer, tuple) else answer)

    _, matrix = feed_forward_output(model, number)
    return [
        matrix.register_forward_pre_hook(before),
        layers_of(model)[number].register_forward_hook(behind),
    ]


def is_streamed(model: nn.Module) -> bool:
    """Whether the layers of a text encoder are read each time that they are used."""
    return any(parameter.is_meta for parameter in layers_of(model).parameters())


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


def _names(base: Base, component: str, model: nn.Module) -> dict[str, str]:
    """By parameter, the canonical name of its weight; without those that no prompt needs.

    Raises BrokenBase for a weight that is missing, or has another shape than the configuration says.
    """
    rules = base.layout.components[component]
    ties = getattr(model, "all_tied_weights_keys", {})
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters(remove_duplicate=False)}
    names = {key: f"{component}/{rules.canonical(ties.get(key, key))}" for key in shapes}
    names = {key: name for key, name in names.items() if not rules.is_unread(name.partition("/")[2])}
    if lacking := sorted(set(names.values()) - base.places.keys()):
        raise BrokenBase(f"the base at {base.path} lacks {lacking[0]}, without which no prompt is read; get it again")
    for key, name in names.items():
        if (found := base.places[name].shape) != shapes[key]:
            raise BrokenBase(
                f"{name} of the base at {base.path} has shape {list(found)}, and by its configuration {list(shapes[key])}; get "
                "its configuration again"
            )
    return names


def _size(base: Base) -> int:
    """Bytes of all text encoders of a base in float32."""
    encoders = base.layout.encoders(base.names)
    return sum(4 * math.prod(place.shape) for name, place in base.places.items() if name.split("/")[0] in encoders)


class LayerMemory:
    """Buffers into which the layers of a text encoder are read in turn.

    Allocating anew for each of them would leave the C library's heap as large as all of them together.
    """

    def __init__(self) -> None:
        self._stored = torch.empty(0, dtype=torch.uint8)
        self._weights: dict[str, Tensor] = {}

    def as_stored(self, places: Iterable[TensorLocation]) -> Tensor:
        """Memory for the largest tensor of a layer, as it is stored."""
        size = max(place.entry.size for place in places)
        if len(self._stored) < size:
            with torch.inference_mode(False):
                self._stored = torch.empty(size, dtype=torch.uint8)
        return self._stored

    def weight(self, key: str, stored: Tensor) -> Tensor:
        """A tensor in float32, in the place of the last one of that key, unless gradients may ask for that one again."""
        if torch.is_grad_enabled():
            return stored.to(torch.float32, copy=True)
        if key not in self._weights or self._weights[key].numel() < stored.numel():
            with torch.inference_mode(False):  # else it could be written to in that mode alone
                self._weights[key] = torch.empty(stored.numel())
        return self._weights[key][: stored.numel()].view(stored.shape).copy_(stored)


def _streamed(base: Base, model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Let layers and large matrices of embeddings be read when they are used; what is read so."""
    path, layers = _layers(model)
    found: dict[str, str] = {}
    # Pipelines send tokens to where a model's first parameter is; this one is never on the meta device.
    model.register_parameter("first", nn.Parameter(torch.empty(0), requires_grad=False))
    memory = LayerMemory()
    for number, layer in enumerate(layers):
        start = f"{path}.{number}."
        part = {key.removeprefix(start): name for key, name in names.items() if key.startswith(start)}
        found.update({f"{start}{key}": name for key, name in part.items()})
        for module, keys in _read_at_once(layer, part):
            places = {key: base.places[name] for key, name in keys.items()}
            slot = "layer." if module is layer else ""  # what a layer holds itself stays while its modules take turns
            module.register_forward_pre_hook(functools.partial(_load, base.containers, places, memory, slot))
            module.register_forward_hook(functools.partial(_drop, tuple(keys)), always_call=True)
    for layer in layers[::-TRIM_EVERY]:
        layer.register_forward_hook(_trim_heap, always_call=True)
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


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """The function of the GNU C library; None where there is another."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def _trim_heap(module: nn.Module, args: Any, answer: Any) -> None:
    """Give the memory that was freed back to the system. The C library would keep it, since small things that stay lie between
    what a layer frees: on SDXL up to 1.3 GB."""
    if trim := _malloc_trim():
        trim(0)


def _read_at_once(layer: nn.Module, names: Mapping[str, str]) -> Iterator[tuple[nn.Module, dict[str, str]]]:
    """The modules of a layer whose parameters are read when they are used, with these: the layer itself, or, where it is large,
    each module that has parameters of its own and no modules inside; what else there is comes with the layer."""
    if 4 * sum(parameter.numel() for parameter in layer.parameters()) <= WHOLE_LAYER:
        yield layer, dict(names)
        return
    rest = dict(names)
    for path, module in layer.named_modules():
        if path and not list(module.children()):
            keys = {key: rest.pop(f"{path}.{key}") for key, _ in module.named_parameters() if f"{path}.{key}" in rest}
            if keys:
                yield module, keys
    if rest:
        yield layer, rest


def _layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The layers that read text, and where they are."""
    lists = [
        (path, each) for path, each in model.named_modules() if isinstance(each, nn.ModuleList) and "vis" not in path
    ]
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _load(containers: Any, places: Any, memory: LayerMemory, slot: str, module: nn.Module, args: Any) -> None:
    for key, stored in read_tensors(places, containers, memory.as_stored(places.values())):
        _put(module, key, memory.weight(slot + key, stored))


def _drop(keys: Sequence[str], module: nn.Module, args: Any, answer: Any) -> None:
    for key in keys:
        holder, _, attribute = key.rpartition(".")
        parameters = module.get_submodule(holder)._parameters
        gone: Any = parameters[attribute]
        parameters[attribute] = nn.Parameter(gone.to("meta"), requires_grad=False)


def _rows(container: Any, entry: TensorEntry, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of a matrix in a file, the rows of some tokens, and which of these is whose."""
    unique, which = tokens.unique(return_inverse=True)
    size = entry.size // entry.shape[0]
    rows = {
        str(row): TensorEntry(entry.dtype, entry.shape[1:], entry.start + row * size, size) for row in unique.tolist()
    }
    # They come in the order of the file, which is that of `unique`.
    return torch.stack([row for _, row in container.read(rows)]).float(), which


def _load_rows(container: Any, entry: TensorEntry, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    rows, which = _rows(container, entry, args[0])
    _put(module, "weight", rows)
    module.padding_idx = None  # type: ignore[assignment]
    return (which, *args[1:])


def _put(model: nn.Module, key: str, values: Tensor) -> None:
    holder, _, attribute = key.rpartition(".")
    model.get_submodule(holder)._parameters[attribute] = nn.Parameter(values, requires_grad=False)


_replacing = threading.RLock()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within the block, new modules of this thread have their parameters on the meta device; buffers, which are computed, are
    real. One thread at a time: what is put in the place of PyTorch's own functions is put there for all threads."""
    thread = threading.get_ident()
    with _replacing:
        register, to_empty = nn.Module.register_parameter, nn.Module.to_empty

        def registered(self: nn.Module, name: str, param: Any) -> None:
            if param is not None and threading.get_ident() == thread:
                param = nn.Parameter(param.to("meta"), requires_grad=False)
            register(self, name, param)

        def emptied(self: nn.Module, **keywords: Any) -> nn.Module:
            # ChatGLM would get memory for its parameters by `torch.nn.utils.skip_init`.
            return self if threading.get_ident() == thread else to_empty(self, **keywords)

        nn.Module.register_parameter = registered  # type: ignore[method-assign]
        nn.Module.to_empty = emptied  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
            nn.Module.to_empty = to_empty  # type: ignore[method-assign]
