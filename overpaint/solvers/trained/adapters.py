"""What is trained: weights in place, or thin factors beside them, so that their change is born low-rank.

Both act on a working copy of a base's models and say what they changed as a delta. `off` puts the base's values back for a
while, which saves a second copy of the models for the teacher.
"""

from __future__ import annotations

import fnmatch
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overpaint.bases.base import Base
from overpaint.bases.layout import PENULTIMATE
from overpaint.patches.delta import Delta, Dense, LowRank, TextMap

KEYS_AND_VALUES = "keys-and-values"
CROSS_ATTENTION = "cross-attention"
ATTENTION = "attention"
UNET = "unet"
"""Names that papers give to parts of a denoiser; on a diffusion transformer, to what does the same there."""

_PATTERNS = {
    KEYS_AND_VALUES: ("transformer/*.add_[kv]_proj.*",),
    CROSS_ATTENTION: ("unet/*.attn2.*", "transformer/*.add_[qkv]_proj.*", "transformer/*.to_add_out.*"),
    ATTENTION: ("unet/*.attn1.*", "unet/*.attn2.*", "transformer/*.attn.*", "transformer/*.attn2.*"),
    UNET: ("unet/*", "transformer/*.weight", "transformer/*.bias"),
}
_BLOCKS = ("unet/*.attentions.*", "transformer/*transformer_blocks.*")
_LAYER = re.compile(r"[^/]+/(?:text_model\.encoder\.layers|encoder\.block)\.([0-9]+)\.")
_FEED_FORWARD = (".mlp.", ".DenseReluDense.")
_SELF_ATTENTION = (".self_attn.", ".SelfAttention.")
"""How CLIP and T5 number their layers, and call what is in them."""


def tensors(base: Base, part: str) -> list[str]:
    """Canonical names of a part's tensors, biases included, sorted; all projections that read a prompt are in each part."""
    return sorted({*base.projections(), *_fitting(base, _PATTERNS[part])})


def layers(base: Base) -> list[str]:
    """The weights of all linear layers and convolutions of the denoiser (norms have none), sorted."""
    return _matrices(base, _PATTERNS[UNET])


def block_layers(base: Base) -> list[str]:
    """The same of its transformer blocks, and all projections that read a prompt, sorted."""
    return sorted({*base.projections(), *_matrices(base, _BLOCKS)})


def with_biases(base: Base, weights: list[str]) -> list[str]:
    """Weights and the biases beside them, sorted."""
    beside = (name.removesuffix("weight") + "bias" for name in weights)
    return sorted([*weights, *(name for name in beside if name in base.places)])


def encoder_layer_tensors(base: Base, *, feed_forward: int | None, attention: int) -> list[str]:
    """The feed-forward tensors of the last so many layers (None: all) of each text encoder, and the attention's, sorted.

    Layers that no prompt passes on its way to the denoiser do not count: where only what stands before the last one is read.
    """
    found = []
    for component in base.layout.encoders(base.names):
        numbered = _encoder_layers(base, component)
        for count, kinds in ((feed_forward, _FEED_FORWARD), (attention, _SELF_ATTENTION)):
            last = numbered if count is None else numbered[max(0, len(numbered) - count) :]
            found += [name for layer in last for name in layer if any(kind in name for kind in kinds)]
    return sorted(name for name in found if "relative_attention_bias" not in name)


def _encoder_layers(base: Base, component: str) -> list[list[str]]:
    """The tensors of each layer of a text encoder, but for a last one that is not read."""
    found: dict[int, list[str]] = {}
    for name in base.names:
        if name.startswith(f"{component}/") and (match := _LAYER.match(name)):
            found.setdefault(int(match[1]), []).append(name)
    outputs = {each.output for each in base.layout.text_inputs.values() if each.encoder == component}
    return [found[number] for number in sorted(found)][: -1 if outputs == {PENULTIMATE} else None]


def _fitting(base: Base, patterns: Iterable[str]) -> list[str]:
    return [name for name in base.names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _matrices(base: Base, patterns: Iterable[str]) -> list[str]:
    found = _fitting(base, patterns)
    return [name for name in found if name.endswith(".weight") and len(base.places[name].shape) > 1]


def text_columns(base: Base, name: str) -> slice | None:
    """The input columns of a tensor that read a prompt, where others read something else; None where it is all or nothing."""
    own = [base.columns(each, name) for each in base.text_inputs if name in base.projections(each)]
    if not own:
        return None
    columns = slice(min(each.start for each in own), max(each.stop for each in own))
    return None if columns == slice(0, base.places[name].shape[-1]) else columns


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


def _within(columns: slice, values: Tensor) -> Tensor:
    """Zeros but for some columns: what reads the size of a picture beside a prompt, in the same matrix, is not trained."""
    found = torch.zeros_like(values)
    found[:, columns] = values[:, columns]
    return found


class DenseAdapter:
    """Weights trained in place, by canonical name; their change is dense."""

    def __init__(self, pipe: Any, base: Base, names: Sequence[str]) -> None:
        self._live, self._before = own_parameters(pipe, base, sorted(names))
        for name, parameter in self._live.items():
            parameter.requires_grad_(True)
            if columns := text_columns(base, name):
                parameter.register_hook(functools.partial(_within, columns))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._live.values())

    def pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """What each parameter is now, and what it is in the base."""
        return zip(self._live.values(), self._before.values(), strict=True)

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
            columns = text_columns(base, name)
            if columns:
                down = _within(columns, down)
            up = torch.zeros(out, len(down))
            pair = nn.Parameter(up.to(module.weight.device)), nn.Parameter(down.to(module.weight.device))
            if columns:
                pair[1].register_hook(functools.partial(_within, columns))
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


def own_parameters(pipe: Any, base: Base, names: Sequence[str]) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Parameters that a pipeline has to itself from now on, by canonical name; and the tensors in whose place they are, which
    others share: not to be written into. What is one parameter in several places stays one."""
    modules = modules_by_parameter(pipe, base)
    shared: dict[str, Tensor] = {name: getattr(modules[name], name.rpartition(".")[2]) for name in names}
    kept = {id(tensor): nn.Parameter(tensor.detach().clone(), requires_grad=False) for tensor in shared.values()}
    for component in {name.partition("/")[0] for name in names}:
        for module in getattr(pipe, component).modules():
            for own, parameter in module._parameters.items():
                if id(parameter) in kept:
                    module._parameters[own] = kept[id(parameter)]
    return {name: kept[id(tensor)] for name, tensor in shared.items()}, {n: t.detach() for n, t in shared.items()}


def modules_by_parameter(pipe: Any, base: Base) -> dict[str, nn.Module]:
    """The module that owns a parameter, for every parameter of a pipeline's models, by canonical name."""
    found: dict[str, nn.Module] = {}
    for component, rules in base.layout.components.items():
        for path, module in getattr(pipe, component).named_modules():
            for own in module._parameters:
                found[f"{component}/{rules.canonical(f'{path}.{own}' if path else own)}"] = module
    return found
