"""The text encoders of a base as models in float32: held whole, or, where they are large, with one layer at a time.

Stable Diffusion XL's would take 3.3 GB. Their layers are read from the base's files each time a batch of prompts comes by,
turned into float32, used and dropped, and of the tokens' embeddings just those are read that the batch has. On two cores,
reading costs about a twentieth of what computing costs. Both ways compute the same from the same numbers: where batches are
equal, so are the bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from overpaint.bases.base import Base, BrokenBase
from overpaint.bases.container import Container, Entry
from overpaint.bases.files import Place, read_places
from overpaint.bases.quiet import quiet_loading

HELD = 600 << 20
"""Bytes in float32. All of a base's text encoders together are held whole up to here; Stable Diffusion 1.x's has 470 MiB."""

BATCH, READ_BATCH = 128, 16
"""Prompts at a time: for a text encoder of SD 1.x's size that is held, fewer for larger ones; and where layers are read."""

_MODELS: dict[str, Any] = {
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
}


class _Read(torch.nn.Module):
    """A layer whose weights are there while it is used; `shell` has their shapes alone."""

    def __init__(self, shell: torch.nn.Module, weights: Callable[[], dict[str, Tensor]]) -> None:
        super().__init__()
        self.shell, self.weights = shell, weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.shell, self.weights(), args, kwargs)


class _Rows(torch.nn.Module):
    """Embeddings of tokens, read when tokens come by; `place` is that of the matrix which has them as rows."""

    def __init__(self, place: Place, container: Container) -> None:
        super().__init__()
        assert not place.transposed, "its rows would not lie together"
        self.entry, self.container = place.entry, container

    def forward(self, tokens: Tensor) -> Tensor:
        unique, which = tokens.unique(return_inverse=True)
        size = self.entry.size // self.entry.shape[0]
        rows = {
            str(row): Entry(self.entry.dtype, self.entry.shape[1:], self.entry.start + row * size, size)
            for row in unique.tolist()
        }
        # They come in the order of the file, which is that of `unique`.
        return torch.stack([row for _, row in self.container.read(rows)]).float()[which]


def tower(base: Base, component: str, device: torch.device | str) -> Any:
    """A text encoder with the weights that the base has, whatever files they lie in, ready to be used.

    What is held follows from the base and the kind of device alone, never from the memory there is. Raises BrokenBase for a
    base that lacks one of its weights.
    """
    rules = base.layout.components[component]
    kind = _MODELS[rules.model]
    with quiet_loading():
        config = CLIPTextConfig.from_pretrained(base.config_folder / component, local_files_only=True)
        with torch.device("meta"):
            shell = kind(config)
        names = {key: f"{component}/{rules.canonical(key)}" for key in shell.state_dict()}
        if lacking := sorted(set(names.values()) - base.places.keys()):
            raise BrokenBase(
                f"the base at {base.path} lacks {lacking[0]}, without which no prompt is read; get it again"
            )
        # The memory of an accelerator is its own, and a layer would take longer to arrive there than to be used.
        if torch.device(device).type != "cpu" or _size(base) <= HELD:
            return _held(kind, config, base, names).to(device).eval()
        return _streamed(kind, config, base, names, shell)


def prompts_at_a_time(model: Any) -> int:
    """How many prompts to hand to a text encoder at once, so that large ones need no more memory than small ones."""
    if any(isinstance(layer, _Read) for layer in layers_of(model)):
        return READ_BATCH
    config = model.config
    return max(1, min(BATCH, BATCH * 768 * 12 // int(config.hidden_size * config.num_hidden_layers)))


def layers_of(model: Any) -> torch.nn.ModuleList:
    """The layers of a text encoder, wherever in the model they are."""
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))


def _size(base: Base) -> int:
    """Bytes of all text encoders of a base in float32."""
    components = {door.encoder for door in base.layout.doors.values()}
    return sum(4 * torch.Size(p.shape).numel() for name, p in base.places.items() if name.split("/")[0] in components)


def _held(kind: Any, config: Any, base: Base, names: dict[str, str]) -> Any:
    weights = base.tensors(names.values())
    state = {key: weights[name] for key, name in names.items()}
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)


def _streamed(kind: Any, config: Any, base: Base, names: dict[str, str], shell: Any) -> Any:
    """The model without its layers and without the embeddings of tokens; in their place, such as are read."""
    layers, where = layers_of(shell), _path_of_layers(shell)
    inside = {key: name for key, name in names.items() if key.startswith(f"{where}.")}
    bare = copy.deepcopy(config)
    bare.num_hidden_layers = 0
    model = _held(kind, bare, base, {key: name for key, name in names.items() if key not in inside}).eval()
    model.config.num_hidden_layers = config.num_hidden_layers
    words = model.get_input_embeddings()
    (key,) = (key for key, held in model.named_parameters() if held is words.weight)
    place = base.places[names[key]]
    model.set_input_embeddings(_Rows(place, base.containers[place.file]))
    held = layers_of(model)
    for number, layer in enumerate(layers.eval()):
        start = f"{where}.{number}."
        part = {key.removeprefix(start): name for key, name in inside.items() if key.startswith(start)}
        held.append(_Read(layer, _reading(base, part)))
    return model


def _path_of_layers(model: Any) -> str:
    layers = layers_of(model)
    where: str = next(path for path, module in model.named_modules() if module is layers)
    return where


def _reading(base: Base, names: dict[str, str]) -> Callable[[], dict[str, Tensor]]:
    """Reads some weights of a base in float32, without keeping the base itself."""
    places, containers = {key: base.places[name] for key, name in names.items()}, base.containers
    return lambda: {key: stored.float() for key, stored in read_places(places, containers)}
