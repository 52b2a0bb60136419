"""A loaded pipeline's parameters by canonical name, and how one notices that somebody else wrote to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from overpaint.bases.base import Base
from overpaint.bases.digests import dtype_name
from overpaint.errors import OverpaintError

PLACES, RUN = 32, 16
"""Where a tensor is looked at to see whether it changed: so many runs of so many values."""


class BadPipeline(OverpaintError):
    """A pipeline that a patch cannot be laid on as it is now."""


_WRAPPERS = ("_orig_mod", "base_layer")
"""Under which name `torch.compile` and PEFT keep the module that they stand in front of."""


@dataclass(frozen=True)
class Slot:
    """Where a parameter lives: the module that holds it, its name there, and the way to the module from its component."""

    module: nn.Module
    attribute: str
    way: tuple[tuple[nn.Module, str, nn.Module], ...]

    @property
    def is_current(self) -> bool:
        """Whether the component still computes with this module."""
        return all(parent._modules.get(key) is child for parent, key, child in self.way)

    @property
    def is_fused(self) -> bool:
        """Whether an attention block on the way computes with a copy (diffusers' `fuse_qkv_projections`)."""
        return any(parent.__dict__.get("fused_projections") for parent, _, _ in self.way[-3:])


class Parameters:
    """The parameters of a pipeline's components, found by canonical name whatever wraps the modules by now.

    Programs replace modules and parameters; writing to one that is no longer in use would change nothing and say
    nothing. So every look-up makes sure that it still is.
    """

    def __init__(self, pipe: Any, base: Base) -> None:
        self._pipe, self._base = pipe, base
        self._components = {
            name: module for name in base.layout.components if (module := _component(pipe, name)) is not None
        }
        self._slots = self._found()

    def _found(self) -> dict[str, Slot]:
        found = {}
        for component, root in self._components.items():
            canonical = self._base.layout.components[component].canonical
            found.update({f"{component}/{canonical(local)}": slot for local, slot in _slots(root)})
        return found

    def check_components(self) -> None:
        """Raise BadPipeline when the pipeline got another model since."""
        for name, module in self._components.items():
            if _component(self._pipe, name) is not module:
                raise BadPipeline(
                    f"the pipeline's {name} was replaced by another model since this overlay was made; "
                    "close the overlay and make a new one"
                )

    def __getitem__(self, name: str) -> nn.Parameter:
        """The parameter of a canonical name. Raises BadPipeline when it is missing, elsewhere, or not what is computed with."""
        slot = self._slots.get(name)
        if slot is None or not slot.is_current:
            self._slots = self._found()
            slot = self._slots.get(name)
        parameter = slot.module._parameters.get(slot.attribute) if slot else None
        if slot is None or parameter is None:
            raise BadPipeline(
                f"the pipeline has no parameter {name}, which a patch changes; load the pipeline of the patch's own base"
            )
        if parameter.is_meta:
            raise BadPipeline(
                f"{name} is offloaded, so that there is nothing to write to; lay patches on before the pipeline is "
                "set to offload layer by layer"
            )
        if slot.is_fused:
            raise BadPipeline(
                f"the pipeline computes with a fused copy of {name}; undo the fusing (unfuse_qkv_projections) first"
            )
        if parameter.shape != self._base.places[name].shape or not parameter.is_floating_point():
            raise BadPipeline(
                f"{name} is {dtype_name(parameter.dtype)} {list(parameter.shape)} in the pipeline, and in the base it has "
                f"shape {list(self._base.places[name].shape)}; load the pipeline from the base, without quantisation"
            )
        return parameter


def _slots(
    module: nn.Module, local: tuple[str, ...] = (), way: tuple[tuple[nn.Module, str, nn.Module], ...] = ()
) -> Iterator[tuple[str, Slot]]:
    """Every parameter of a module and its children, by its name without wrappers."""
    for attribute in module._parameters:
        yield ".".join((*local, attribute)), Slot(module, attribute, way)
    for key, child in module._modules.items():
        if child is not None:
            inner = local if key in _WRAPPERS else (*local, key)
            yield from _slots(child, inner, (*way, (module, key, child)))


class Seal:
    """How a parameter looked when its values were last known.

    Whoever writes to a tensor in the usual ways moves its version counter; whoever replaces or moves it changes its
    address. Writing through `.data` or NumPy does neither, as merging a LoRA does: that is what some sampled values are
    for. They find a change of many values, not one of a few; `Overlay.verify` looks at all.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self._sample = _sample(parameter)
        self.renew(parameter)

    def renew(self, parameter: nn.Parameter) -> None:
        """Seal the same parameter again, after it was written to in place."""
        self._look, self._values = _look(parameter), self._sample.clone()

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether nothing speaks for a change since."""
        return self._look == _look(parameter) and torch.equal(self._values, self._sample)


def _look(parameter: nn.Parameter) -> tuple[int, ...]:
    return id(parameter), parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


def _sample(parameter: nn.Parameter) -> Tensor:
    """A view of short runs of values, spread over the whole tensor; each costs one access to distant memory."""
    whole = parameter.detach()
    dense = whole.is_contiguous() or (whole.ndim == 4 and whole.is_contiguous(memory_format=torch.channels_last))
    if not dense or whole.numel() < PLACES * RUN:
        return whole
    return whole.as_strided((PLACES, RUN), (whole.numel() // PLACES, 1))


def _component(pipe: Any, name: str) -> nn.Module | None:
    """A pipeline's model, without what `torch.compile` wraps around it."""
    found = getattr(pipe, name, None)
    found = getattr(found, "_orig_mod", found)
    return found if isinstance(found, nn.Module) else None
