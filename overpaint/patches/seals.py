"""How one notices that somebody else wrote to parameters, without looking at every value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLACES, RUN = 32, 16
"""Where a tensor is looked at to see whether it changed: so many runs of so many values."""

View = Tensor | np.ndarray[Any, Any]
"""Some of a parameter's values, as they are whenever one looks."""


@dataclass(frozen=True, eq=False)
class _Sealed:
    """Parameters that were sealed at once, alike in shape, dtype and place."""

    names: tuple[str, ...]
    views: list[View]
    looks: list[tuple[object, ...]]
    samples: bytes

    def all_hold(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether all of them are among `parameters`, and nothing speaks for a change of any."""
        now = [_look(parameters[name]) for name in self.names if name in parameters]
        return now == self.looks and _sample(self.views) == self.samples

    def holds(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether nothing speaks for a change of this one."""
        at, size = self.names.index(name), len(self.samples) // len(self.names)
        row = self.samples[at * size : (at + 1) * size]
        return self.looks[at] == _look(parameter) and _sample(self.views[at : at + 1]) == row


class Seals:
    """How parameters looked when their values were last known, by name.

    Whoever writes to a tensor in the usual ways moves its version counter; whoever replaces or moves it changes its
    address or its order in memory. Writing through `.data` or NumPy does neither, as merging a LoRA does: that is what some
    sampled values are for. They find a change of many values, not one of a few; `Overlay.verify` looks at all.
    """

    def __init__(self) -> None:
        self._views: dict[str, View] = {}
        self._sealed: dict[str, _Sealed] = {}

    def put(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Seal parameters for the first time, or after they were replaced."""
        self._views.update({name: _view(parameter) for name, parameter in parameters.items()})
        self.renew(parameters)

    def renew(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Seal the same parameters again, after they were written to in place."""
        alike: dict[object, list[str]] = {}
        for name in parameters:
            view = self._views[name]
            alike.setdefault((view.shape, view.dtype, getattr(view, "device", None)), []).append(name)
        for names in alike.values():
            views, looks = [self._views[name] for name in names], [_look(parameters[name]) for name in names]
            self._sealed.update(dict.fromkeys(names, _Sealed(tuple(names), views, looks, _sample(views))))

    def broken(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """Those of the parameters that have no seal, or for which something speaks for a change since."""
        # What was sealed at once is looked at at once: sampling so few values is all overhead.
        sealed = {self._sealed[name] for name in parameters if name in self._sealed}
        whole = {name for some in sealed if some.all_hold(parameters) for name in some.names}
        return [name for name in parameters if name not in whole and not self._holds(name, parameters[name])]

    def _holds(self, name: str, parameter: nn.Parameter) -> bool:
        return name in self._sealed and self._sealed[name].holds(name, parameter)

    def clear(self) -> None:
        """Let go of everything."""
        self._views.clear()
        self._sealed.clear()


def _sample(views: Sequence[View]) -> bytes:
    """The values that some views show, one after the other."""
    tensors = [view for view in views if isinstance(view, Tensor)]
    if not tensors:
        return np.concatenate(views).tobytes()
    return torch.stack(tensors).flatten().view(torch.uint8).cpu().numpy().tobytes()


def _look(parameter: nn.Parameter) -> tuple[object, ...]:
    version = 0 if parameter.is_inference() else parameter._version
    return id(parameter), parameter.data_ptr(), parameter.stride(), version


def _view(parameter: nn.Parameter) -> View:
    """Short runs of values, spread over the whole tensor; each costs one access to distant memory."""
    whole = parameter.detach()
    dense = whole.is_contiguous() or (whole.ndim == 4 and whole.is_contiguous(memory_format=torch.channels_last))
    if dense and whole.numel() >= PLACES * RUN:
        whole = whole.as_strided((PLACES, RUN), (whole.numel() // PLACES, 1))
    elif whole.is_contiguous():
        whole = whole.view(-1)
    else:
        return whole
    # NumPy gathers runs in a third of the time; bytes, because it does not know bfloat16.
    return whole if whole.device.type != "cpu" else whole.view(torch.uint8).numpy()
