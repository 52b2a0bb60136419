"""A loaded pipeline's parameters by canonical name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from overpaint.bases.base import Base
from overpaint.bases.digests import dtype_name
from overpaint.errors import OverpaintError


class BadPipeline(OverpaintError):
    """A pipeline that a patch cannot be laid on as it is now."""


_WRAPPERS = ("_orig_mod", "base_layer")
"""Under which name `torch.compile` and PEFT keep the module that they stand in front of."""


Step = tuple[nn.Module, str, nn.Module]
"""From a module to one that it holds, and under which name."""


@dataclass(frozen=True)
class Slot:
    """Where a parameter lives: the module that holds it, its name there, and the way to the module from its component."""

    module: nn.Module
    attribute: str
    way: tuple[Step, ...]

    @property
    def is_fused(self) -> bool:
        """Whether an attention block on the way computes with a copy (diffusers' `fuse_qkv_projections`)."""
        return any(parent.__dict__.get("fused_projections") for parent, _, _ in self.way[-3:])


class Slots:
    """Some slots, by canonical name, and the steps on the way to them, each once however many slots lie beyond it."""

    def __init__(self, found: Mapping[str, Slot], names: Sequence[str]) -> None:
        self.names = names
        self.slots = {name: found.get(name) for name in names}
        there = [slot for slot in self.slots.values() if slot]
        self._steps = tuple(dict.fromkeys(step for slot in there for step in slot.way))
        self._is_whole = len(there) == len(names)

    @property
    def are_current(self) -> bool:
        """Whether all are there and the components still compute with their modules."""
        # This is asked at every change; a plain loop takes half the time of `all`.
        for parent, key, child in self._steps:
            if parent._modules.get(key) is not child:
                return False
        return self._is_whole

    @property
    def may_be_fused(self) -> bool:
        """Whether a module on the way to one of them says that it computes with copies of some weights."""
        return any(parent.__dict__.get("fused_projections") for parent, _, _ in self._steps)


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
        self._all = self._found()
        self._asked = Slots(self._all, ())

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

    def of(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Parameters by canonical name. Raises BadPipeline when one is missing, elsewhere, or not what is computed with."""
        names = tuple(names)
        if names != self._asked.names:
            self._asked = Slots(self._all, names)
        if not self._asked.are_current:
            self._all = self._found()
            self._asked = Slots(self._all, names)
        may_be_fused = self._asked.may_be_fused
        return {name: self._checked(name, slot, may_be_fused) for name, slot in self._asked.slots.items()}

    def _checked(self, name: str, slot: Slot | None, may_be_fused: bool) -> nn.Parameter:
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
        if may_be_fused and slot.is_fused:
            raise BadPipeline(
                f"the pipeline computes with a fused copy of {name}; undo the fusing (unfuse_qkv_projections) first"
            )
        if parameter.shape != self._base.places[name].shape or not parameter.is_floating_point():
            raise BadPipeline(
                f"{name} is {dtype_name(parameter.dtype)} {list(parameter.shape)} in the pipeline, and in the base it has "
                f"shape {list(self._base.places[name].shape)}; load the pipeline from the base, without quantisation"
            )
        return parameter


def _slots(module: nn.Module, local: tuple[str, ...] = (), way: tuple[Step, ...] = ()) -> Iterator[tuple[str, Slot]]:
    """Every parameter of a module and its children, by its name without wrappers."""
    for attribute in module._parameters:
        yield ".".join((*local, attribute)), Slot(module, attribute, way)
    for key, child in module._modules.items():
        if child is not None:
            inner = local if key in _WRAPPERS else (*local, key)
            yield from _slots(child, inner, (*way, (module, key, child)))


def _component(pipe: Any, name: str) -> nn.Module | None:
    """A pipeline's model, without what `torch.compile` wraps around it."""
    found = getattr(pipe, name, None)
    found = getattr(found, "_orig_mod", found)
    return found if isinstance(found, nn.Module) else None
