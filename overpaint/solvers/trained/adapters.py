"""What is trained: weights in place, or thin factors beside them, so that their change is born low-rank.

Both act on a working copy of a base's models and say what they changed as a delta. `off` puts the base's values back for a
while, which saves a second copy of the models for the teacher.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overpaint.bases.base import Base
from overpaint.patches.delta import Delta, Dense, LowRank, TextMap

KEYS_AND_VALUES = "keys-and-values"
CROSS_ATTENTION = "cross-attention"
ATTENTION = "attention"
UNET = "unet"

_LAYERS = "text_encoder/text_model.encoder.layers."
_PATTERNS = {
    CROSS_ATTENTION: ("unet/*.attn2.*",),
    ATTENTION: ("unet/*.attn1.*", "unet/*.attn2.*"),
    UNET: ("unet/*",),
}


def tensors(base: Base, part: str) -> list[str]:
    """Canonical names of a part's tensors, biases included, sorted."""
    if part == KEYS_AND_VALUES:
        return base.projections()
    return [name for name in base.names if any(fnmatch.fnmatchcase(name, pattern) for pattern in _PATTERNS[part])]


def layers(base: Base, pattern: str) -> list[str]:
    """The weights of all linear layers and convolutions (norms have none) whose names fit a pattern, sorted."""
    return [
        name
        for name in fnmatch.filter(base.names, pattern)
        if name.endswith(".weight") and len(base.places[name].shape) > 1
    ]


def with_biases(base: Base, weights: list[str]) -> list[str]:
    """Weights and the biases beside them, sorted."""
    beside = (name.removesuffix("weight") + "bias" for name in weights)
    return sorted([*weights, *(name for name in beside if name in base.places)])


def encoder_layers(base: Base) -> int:
    """How many layers a base's text encoder has."""
    return 1 + max(int(found[1]) for name in base.names if (found := re.match(f"{_LAYERS}([0-9]+)[.]", name)))


def encoder_layer_tensors(base: Base, *, feed_forward: int, attention: int) -> list[str]:
    """The feed-forward tensors of the text encoder's last so many layers, and the attention's of its last so many, sorted."""
    count = encoder_layers(base)
    wanted = [f"{_LAYERS}{count - 1 - i}.mlp.*" for i in range(min(feed_forward, count))]
    wanted += [f"{_LAYERS}{count - 1 - i}.self_attn.*" for i in range(min(attention, count))]
    return sorted(name for pattern in wanted for name in fnmatch.filter(base.names, pattern))


class Adapter(Protocol):
    """Something that is trained, and what it amounts to."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser moves; float32."""
        ...

    def off(self) -> Any:
        """A context manager: within the block, the models are the base's."""
        ...

    def delta(self) -> Delta:
        """The change so far."""
        ...


@contextmanager
def held(parameters: Iterable[nn.Parameter], values: Iterable[Tensor]) -> Iterator[None]:
    """Within the block, parameters have other values. No gradient may be taken of what is computed there."""
    kept = [(parameter, parameter.data) for parameter in parameters]
    for (parameter, _), value in zip(kept, values, strict=True):
        parameter.data = value
    try:
        yield
    finally:
        for parameter, before in kept:
            parameter.data = before


class DenseAdapter:
    """Weights trained in place, by canonical name; their change is dense."""

    def __init__(self, pipe: Any, base: Base, names: Sequence[str]) -> None:
        modules = modules_by_parameter(pipe, base)
        self._live = {
            name: getattr(modules[name], name.rpartition(".")[2]).requires_grad_(True) for name in sorted(names)
        }
        self._before = {name: parameter.detach().clone() for name, parameter in self._live.items()}

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._live.values())

    def off(self) -> Any:
        return held(self.parameters, self._before.values())

    def delta(self) -> Delta:
        """The differences to the base, float32."""
        return Dense({name: now.detach() - self._before[name] for name, now in self._live.items()})


class _Beside:
    """What stands beside a base's weights and can be left out."""

    _active = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block, the models are the base's."""
        self._active = False
        try:
            yield
        finally:
            self._active = True


class LowRankAdapter(_Beside):
    """Adapters beside linear layers and convolutions: `up down` is added to the weight, through the layer's output.

    `up` (out x r) is zero at first and `down` (r x in) random, as usual for low-rank adaptation (Hu et al., arXiv 2106.09685);
    a convolution's `down` is a convolution of the same shape. Biases stay.
    """

    def __init__(self, pipe: Any, base: Base, names: Sequence[str], rank: int, random: torch.Generator) -> None:
        modules = modules_by_parameter(pipe, base)
        self._factors: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name in sorted(names):
            module: Any = modules[name]
            out, inner = module.weight.shape[0], module.weight[0].numel()
            down = torch.empty(min(rank, out, inner), inner)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=random)
            up = torch.zeros(out, len(down))
            pair = nn.Parameter(up.to(module.weight.device)), nn.Parameter(down.to(module.weight.device))
            self._factors[name] = pair
            module.register_forward_hook(self._hook(*pair))

    def _hook(self, up: nn.Parameter, down: nn.Parameter) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
        def add(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self._active:
                return output
            if isinstance(module, nn.Conv2d):
                kernel = down.view(len(down), *module.weight.shape[1:])
                thin = F.conv2d(inputs[0], kernel, None, module.stride, module.padding, module.dilation)
                return output + F.conv2d(thin, up[:, :, None, None])
            return output + F.linear(F.linear(inputs[0], down), up)

        return add

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [side for pair in self._factors.values() for side in pair]

    def delta(self) -> Delta:
        return LowRank({name: (up, down) for name, (up, down) in self._factors.items()})


class TextMapAdapter(_Beside):
    """A text map in training: embeddings h [..., d] become `h + U D^T h`; U is zero at first and D random."""

    def __init__(self, encoder: str, width: int, rank: int, random: torch.Generator, device: torch.device) -> None:
        self._encoder = encoder
        down = torch.empty(min(rank, width), width)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=random)
        self._down = nn.Parameter(down.T.contiguous().to(device))
        self._up = nn.Parameter(torch.zeros(width, min(rank, width), device=device))

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden + (hidden @ self._down) @ self._up.T if self._active else hidden

    def size(self) -> Tensor:
        """`|U D^T|^2`, from the factors' own products."""
        return ((self._up.T @ self._up) * (self._down.T @ self._down)).sum()

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self._up, self._down]

    def delta(self) -> Delta:
        return TextMap(self._encoder, self._up, self._down)


class AdapterStack:
    """Several changes trained as one."""

    def __init__(self, *changes: Adapter) -> None:
        self._changes = changes

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for change in self._changes for p in change.parameters]

    @contextmanager
    def off(self) -> Iterator[None]:
        with ExitStack() as stack:
            for change in self._changes:
                stack.enter_context(change.off())
            yield

    def delta(self) -> Delta:
        first, *others = (change.delta() for change in self._changes)
        for other in others:
            first = first + other
        return first


class MovingAverage:
    """The exponential moving average of parameters; `decay` is the weight of earlier values."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = list(parameters), decay
        self._values = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards what the parameters are now."""
        torch._foreach_lerp_(self._values, [p.detach() for p in self._parameters], 1 - self._decay)

    def held(self) -> Any:
        """A context manager: within the block, the parameters are their average."""
        return held(self._parameters, self._values)

    @torch.no_grad()
    def take(self) -> None:
        """Make the average what the parameters are."""
        for parameter, value in zip(self._parameters, self._values, strict=True):
            parameter.copy_(value)


def modules_by_parameter(pipe: Any, base: Base) -> dict[str, nn.Module]:
    """The module that owns a parameter, for every parameter of a pipeline's models, by canonical name."""
    found: dict[str, nn.Module] = {}
    for component, rules in base.layout.components.items():
        for path, module in getattr(pipe, component).named_modules():
            for own in module._parameters:
                found[f"{component}/{rules.canonical(f'{path}.{own}' if path else own)}"] = module
    return found
