"""A composition on a loaded pipeline: applied, changed and removed without loading anything again.

The base's values of the changed tensors are held in memory, and every change composes from them anew; nothing is ever
subtracted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from overpaint.bases.base import Base
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.safetensors_file import dtype_name
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.patches.arithmetic import Original, ScratchBuffers, Target
from overpaint.patches.compose import CompositionPlan, Term, plan
from overpaint.patches.delta import identical


class BadPipeline(OverpaintError):
    """A pipeline that no patch can be applied to as it is now."""


_WRAPPERS = ("_orig_mod", "base_layer")
"""Under which name `torch.compile` and PEFT keep the module that they stand in front of."""


_HOOKS = "_diffusers_hook"
"""Under which name diffusers keeps a module's hooks."""


_PLAIN = (Tensor, nn.Parameter)
"""The kinds of tensors that are their numbers. Others (of bitsandbytes, torchao, quanto) may have a base's shape and dtype, and
yet hold codes and scales."""


Step = tuple[nn.Module, str, nn.Module]
"""From a module to one that it holds, and under which name."""


@dataclass(frozen=True)
class ParameterSlot:
    """Where a parameter lives: the module that holds it, its name there, and the way to the module from its component."""

    module: nn.Module
    attribute: str
    way: tuple[Step, ...]

    @property
    def value(self) -> Tensor | None:
        """The parameter, or the tensor in the CPU's memory that accelerate's offloading keeps in its stead; None without one."""
        parameter = self.module._parameters.get(self.attribute)
        # Asked for at every change: what is not offloaded is answered without another look-up.
        if parameter is None or not parameter.is_meta:
            return parameter
        hook = self.module.__dict__.get("_hf_hook")
        maps = [getattr(each, "weights_map", None) for each in getattr(hook, "hooks", (hook,))]
        kept: Mapping[str, Any] = next((found for found in maps if found is not None and self.attribute in found), {})
        stored = kept.get(self.attribute)
        # What is on a disk is read into new memory at each look; to write there would change nothing.
        is_held = isinstance(stored, Tensor) and stored is kept.get(self.attribute)
        return stored if is_held else parameter

    @property
    def is_on_disk(self) -> bool:
        """Whether diffusers' group offloading reads the parameter from a file before each use."""
        modules = (self.module, *(parent for parent, _, _ in self.way))
        groups = [hook.group for each in modules for hook in _hooks(each) if hasattr(hook, "group")]
        return any(group.offload_to_disk_path is not None for group in groups)

    @property
    def is_fused(self) -> bool:
        """Whether an attention block on the way computes with a copy (diffusers' `fuse_qkv_projections`)."""
        return any(_computes_fused(parent) for parent, _, _ in self.way[-3:])


def _computes_fused(block: nn.Module) -> bool:
    """Whether an attention block computes with fused copies: by its flag alone, or by its processor, in which case the flag stays
    after `unfuse_qkv_projections`."""
    processor = getattr(block, "processor", None)
    by_flag = processor is None or hasattr(block, "unfuse_projections")
    is_fused = by_flag or type(processor).__name__.startswith("Fused")
    return is_fused and bool(block.__dict__.get("fused_projections"))


def _hooks(module: nn.Module) -> list[Any]:
    """diffusers' hooks of a module."""
    registry = module.__dict__.get(_HOOKS)
    return [] if registry is None else list(registry.hooks.values())


class ParameterSlots:
    """Some slots, by canonical name, and the steps on the way to them, each once however many slots lie beyond it."""

    def __init__(self, found: Mapping[str, ParameterSlot], names: Sequence[str]) -> None:
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
    def may_have_copies(self) -> bool:
        """Whether a module on the way to one of them computes with copies of some weights, or has diffusers' hooks."""
        for parent, _, child in self._steps:
            if parent.__dict__.get("fused_projections") or _HOOKS in parent.__dict__ or _HOOKS in child.__dict__:
                return True
        return False


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
        self._asked = ParameterSlots(self._all, ())

    def _found(self) -> dict[str, ParameterSlot]:
        slots = {}
        for component, root in self._components.items():
            canonical = self._base.layout.components[component].canonical
            slots.update({f"{component}/{canonical(local)}": slot for local, slot in _slots(root)})
        return slots

    def check_components(self) -> None:
        """Raise BadPipeline when the pipeline got another model since."""
        for name, module in self._components.items():
            if _component(self._pipe, name) is not module:
                raise BadPipeline(
                    f"the pipeline's {name} was replaced by another model since this overlay was made; "
                    "close the overlay and make a new one"
                )

    def of(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Parameters by canonical name. Raises BadPipeline when one is missing, elsewhere, or not what is computed with."""
        names = tuple(names)
        if names != self._asked.names:
            self._asked = ParameterSlots(self._all, names)
        if not self._asked.are_current:
            self._all = self._found()
            self._asked = ParameterSlots(self._all, names)
        may_have_copies = self._asked.may_have_copies
        return {name: self._checked(name, slot, may_have_copies) for name, slot in self._asked.slots.items()}

    def _checked(self, name: str, slot: ParameterSlot | None, may_have_copies: bool) -> Tensor:
        parameter = slot.value if slot else None
        if slot is None or parameter is None:
            raise BadPipeline(
                f"the pipeline has no parameter {name}, which a patch changes; load the pipeline of the patch's own base"
            )
        if parameter.is_meta or (may_have_copies and slot.is_on_disk):
            raise BadPipeline(
                f"{name} is offloaded to where it cannot be written; offload the pipeline to the CPU's memory instead, or apply "
                "patches first and offload then"
            )
        if may_have_copies and slot.is_fused:
            raise BadPipeline(
                f"the pipeline computes with a fused copy of {name}; undo the fusing (unfuse_qkv_projections) first"
            )
        if type(parameter) not in _PLAIN or not parameter.is_floating_point():
            layer = name.partition("/")[2].rpartition(".")[0]
            raise BadPipeline(
                f"{name} is quantised in the pipeline ({type(parameter).__name__}, {_described(parameter)}), and a patch needs "
                f"its numbers; leave the layer as it is when quantising (bitsandbytes: llm_int8_skip_modules=[{layer!r}]), or "
                "load the pipeline without quantisation"
            )
        if parameter.shape != self._base.places[name].shape:
            raise BadPipeline(
                f"{name} is {_described(parameter)} in the pipeline, and in the base it has "
                f"shape {list(self._base.places[name].shape)}; load the pipeline from the base, without quantisation"
            )
        return parameter


def _described(parameter: Tensor) -> str:
    return f"{dtype_name(parameter.dtype)} {list(parameter.shape)}"


def _slots(
    module: nn.Module, local: tuple[str, ...] = (), way: tuple[Step, ...] = ()
) -> Iterator[tuple[str, ParameterSlot]]:
    """Every parameter of a module and its children, by its name without wrappers."""
    for attribute in module._parameters:
        yield ".".join((*local, attribute)), ParameterSlot(module, attribute, way)
    for key, child in module._modules.items():
        if child is not None:
            inner = local if key in _WRAPPERS else (*local, key)
            yield from _slots(child, inner, (*way, (module, key, child)))


def _component(pipe: Any, name: str) -> nn.Module | None:
    """A pipeline's model, without what `torch.compile` wraps around it."""
    module = getattr(pipe, name, None)
    module = getattr(module, "_orig_mod", module)
    return module if isinstance(module, nn.Module) else None


PLACES, RUN = 32, 16
"""Where a tensor is looked at to see whether it changed: so many runs of so many values."""

View = Tensor | np.ndarray[Any, Any]
"""Some of a parameter's values, as they are whenever one signatures."""


@dataclass(frozen=True, eq=False)
class _Watched:
    """Parameters that were recorded together, alike in shape, dtype and device."""

    names: tuple[str, ...]
    views: list[View]
    signatures: list[tuple[object, ...]]
    samples: bytes

    def all_hold(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether all of them are among `parameters`, and nothing suggests that one changed."""
        now = [_signature(parameters[name]) for name in self.names if name in parameters]
        return now == self.signatures and _sample(self.views) == self.samples

    def holds(self, name: str, parameter: Tensor) -> bool:
        """Whether nothing suggests that this one changed."""
        at, size = self.names.index(name), len(self.samples) // len(self.names)
        row = self.samples[at * size : (at + 1) * size]
        return self.signatures[at] == _signature(parameter) and _sample(self.views[at : at + 1]) == row


class ChangeDetector:
    """How parameters looked when their values were last known, by name.

    Whoever writes to a tensor in the usual ways moves its version counter; whoever replaces or moves it changes its
    address or its order in memory. Writing through `.data` or NumPy does neither, as merging a LoRA does: that is what some
    sampled values are for. They find a change of many values, not one of a few; `Overlay.verify` signatures at all.
    """

    def __init__(self) -> None:
        self._views: dict[str, View] = {}
        self._watched: dict[str, _Watched] = {}

    def put(self, parameters: Mapping[str, Tensor]) -> None:
        """Record parameters for the first time, or after they were replaced."""
        self._views.update({name: _view(parameter) for name, parameter in parameters.items()})
        self.renew(parameters)

    def renew(self, parameters: Mapping[str, Tensor]) -> None:
        """Record the same parameters again, after they were written to in place."""
        alike: dict[object, list[str]] = {}
        for name in parameters:
            view = self._views[name]
            alike.setdefault((view.shape, view.dtype, getattr(view, "device", None)), []).append(name)
        for names in alike.values():
            views, signatures = [self._views[name] for name in names], [_signature(parameters[name]) for name in names]
            self._watched.update(dict.fromkeys(names, _Watched(tuple(names), views, signatures, _sample(views))))

    def broken(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Those of the parameters that were not recorded, or that seem to have changed since."""
        # What was recorded together is compared together: sampling so few values is all overhead.
        watched = {self._watched[name] for name in parameters if name in self._watched}
        whole = {name for some in watched if some.all_hold(parameters) for name in some.names}
        return [name for name in parameters if name not in whole and not self._holds(name, parameters[name])]

    def _holds(self, name: str, parameter: Tensor) -> bool:
        return name in self._watched and self._watched[name].holds(name, parameter)

    def clear(self) -> None:
        """Let go of everything."""
        self._views.clear()
        self._watched.clear()


def _sample(views: Sequence[View]) -> bytes:
    """The values that some views show, one after the other."""
    tensors = [view for view in views if isinstance(view, Tensor)]
    if not tensors:
        return np.concatenate(views).tobytes()
    return torch.stack(tensors).flatten().view(torch.uint8).cpu().numpy().tobytes()


def _signature(parameter: Tensor) -> tuple[object, ...]:
    version = 0 if parameter.is_inference() else parameter._version
    return id(parameter), parameter.data_ptr(), parameter.stride(), version


def _view(parameter: Tensor) -> View:
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


class ForeignChange(OverpaintError):
    """Weights that somebody else changed since this overlay last wrote them."""


class Overlay:
    """Keeps a pipeline equal to `compose(base, terms)`, whatever was set before.

    Values are composed on the CPU in the base's own dtypes, the very bits that a build writes, and then cast and moved to
    where the pipeline has its parameters; these are written in place, so that compiled graphs and other holders of a module
    see them. The base's values of a tensor are read when it is first touched, compared with the pipeline, and held until
    `close` (pinned when the pipeline is on a GPU); after that, no change reads a file.

    A failure leaves the pipeline bit for bit as it was. Raises ForeignChange when a tensor that is carried or wanted is not
    what this overlay or the base would have there (another overlay on a shared module counts as somebody else), BadPipeline
    when there is nothing to write to. Use it from one thread at a time, and not while the pipeline draws.
    """

    def __init__(self, pipe: Any, base: Base) -> None:
        self.base = base
        self._parameters: Parameters | None = Parameters(pipe, base)
        self._work = ScratchBuffers()
        self._plan = plan(base, (), self._work)
        self._originals: dict[str, Original] = {}
        self._targets: dict[str, Target] = {}
        self._detector = ChangeDetector()
        self._half_written: set[str] = set()
        self._staged: dict[torch.dtype, Tensor] = {}
        self._warned = False

    @property
    def terms(self) -> tuple[Term, ...]:
        """What the pipeline carries, sorted by patch id."""
        return self._plan.terms

    @property
    def touched(self) -> list[str]:
        """Canonical names of the tensors that patches now change."""
        return self._plan.names

    def set(self, terms: Iterable[Term]) -> None:
        """Make the pipeline carry exactly these patches. Only tensors whose patches differ are computed again."""
        wanted, before = plan(self.base, terms, self._work), self._plan
        names = sorted(before.stacks.keys() | wanted.stacks.keys() | self._half_written)
        parameters = self._check(names)
        stacks = {name: (before.stacks.get(name), wanted.stacks.get(name)) for name in names}
        # Once for each pair of stacks: comparing two thousand patches tensor by tensor would take longer than writing.
        same = {(a, b): a is not None and b is not None and a.pieces == b.pieces for a, b in set(stacks.values())}
        changed = [name for name in names if name in self._half_written or not same[stacks[name]]]
        self._write({name: parameters[name] for name in changed}, wanted)

    def add(self, term: Term) -> None:
        """Add one patch, or give one that is there another strength."""
        self.set([*(t for t in self.terms if t.id != term.id), term])

    def remove(self, patch_id: str) -> None:
        """Remove one patch. Raises NotFound when it is not there."""
        if all(term.id != patch_id for term in self.terms):
            raise NotFound(f"patch {patch_id[:12]} is not on this pipeline, so it cannot be removed")
        self.set(term for term in self.terms if term.id != patch_id)

    def clear(self) -> None:
        """Give the base's weights back."""
        self.set(())

    @contextmanager
    def applied(self, terms: Iterable[Term]) -> Iterator[None]:
        """Carry these patches within the block, then what was carried before."""
        before = self.terms
        self.set(terms)
        try:
            yield
        finally:
            self.set(before)

    def verify(self) -> None:
        """Compare every value of every touched tensor with the composition. Raises ForeignChange where one differs."""
        self._detector.clear()
        self._check(self.touched)

    @own_torch_settings()
    @torch.inference_mode()
    def rounding_error(self) -> float:
        """How far the pipeline's touched tensors are from the composition, relative to what the patches change in them.

        0 where it computes in the base's own precision or a wider one; some 0.003 of a change where it computes in bfloat16, 0.05
        where weights are stored in eight bits (`enable_layerwise_casting`). Raises as `verify`.
        """
        parameters = self._check(self.touched)
        missed = changed = 0.0
        for name in self.touched:
            original = self._originals[name]
            composed = self._composed(name, original)
            missed += float((parameters[name].cpu().double() - composed.double()).square().sum())
            changed += float((composed.double() - original.values.double()).square().sum())
        return math.sqrt(missed / changed) if changed else 0.0

    def close(self) -> None:
        """Give the base's weights back and let go of the pipeline and of all that is held; closing twice is closing once.

        Lets go also when the weights cannot be given back because somebody else changed them.
        """
        if self._parameters is None:
            return
        try:
            self.clear()
        finally:
            self._parameters, self._work = None, ScratchBuffers()
            self._plan = plan(self.base, (), self._work)
            for held in (self._originals, self._targets, self._detector, self._half_written, self._staged):
                held.clear()

    def __enter__(self) -> Overlay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @own_torch_settings()
    def _check(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The parameters of these names, after making sure that they hold what they should and can be written to."""
        if self._parameters is None:
            raise OverpaintError("this overlay is closed; make a new one")
        self._parameters.check_components()
        parameters = self._parameters.of(names)
        changed = {name: parameters[name] for name in self._detector.broken(parameters)}
        fresh: dict[str, Original] = {}
        for name, parameter in changed.items():
            original = self._originals.get(name)
            if original is None:
                original = self._plan.original(name)
                if parameter.is_cuda:
                    original = replace(original, values=original.values.pin_memory())
                fresh[name] = original
            if name not in self._half_written:
                self._compare(name, parameter, original)
        self._originals.update(fresh)
        if changed:
            self._detector.put(changed)
            for name in changed:
                self._targets.pop(name, None)
        return parameters

    @torch.inference_mode()
    def _compare(self, name: str, parameter: Tensor, original: Original) -> None:
        expected = self._composed(name, original) if name in self._plan.stacks else original.values
        if not identical(parameter.detach().cpu(), expected.to(parameter.dtype)):
            raise ForeignChange(
                f"{name} is not what {'Overpaint left there' if name in self._originals else 'the base has there'}: something "
                "else (a LoRA, a fine-tune, another overlay) changed it; undo that, or load the pipeline again and apply "
                "the recipe first"
            )

    def _composed(self, name: str, original: Original) -> Tensor:
        """What a touched tensor should be, in the base's dtype, on the CPU."""
        composed = torch.empty_like(original.values)
        self._plan.write(name, Target(original, composed, self._work))
        return composed

    # Weights from inference mode may be written in inference mode only, and others in it as well.
    @own_torch_settings()
    @torch.inference_mode()
    def _write(self, parameters: dict[str, Tensor], wanted: CompositionPlan) -> None:
        """Write all tensors or none."""
        self._half_written.update(parameters)
        self._warn_of_coarse(parameters)
        try:
            self._put(parameters, wanted)
            self._plan = wanted
        except BaseException:
            # What was there is composed again rather than remembered: the same bits, and no second copy of every weight.
            self._put(parameters, self._plan)
            self._half_written.clear()
            raise
        self._half_written.clear()

    def _warn_of_coarse(self, parameters: Mapping[str, Tensor]) -> None:
        """Say once that eight bits hold the base's values exactly and what is composed only nearly."""
        coarse = [name for name, parameter in parameters.items() if parameter.element_size() == 1]
        if coarse and not self._warned:
            self._warned = True
            warnings.warn(
                f"{coarse[0]} is stored as {dtype_name(parameters[coarse[0]].dtype)} in the pipeline, so that patches are "
                "rounded to eight bits and erase slightly less or more than they should (Overlay.rounding_error says how far); "
                "leave what reads the prompt in 16 bits, by skip_modules_pattern",
                stacklevel=2,
            )

    def _put(self, parameters: dict[str, Tensor], wanted: CompositionPlan) -> None:
        for name, parameter in parameters.items():
            if name not in wanted.stacks:
                parameter.copy_(self._originals[name].values)
                continue
            target = self._targets.get(name) or self._target(name, parameter)
            wanted.write(name, target)
            if target.out is not parameter:
                parameter.copy_(target.out)
        self._detector.renew(parameters)

    def _target(self, name: str, parameter: Tensor) -> Target:
        """The parameter itself, where composed values can be written to it as they are, or memory on the way to it."""
        original = self._originals[name]
        values = original.values
        if parameter.device == values.device and parameter.dtype == values.dtype and parameter.is_contiguous():
            return self._targets.setdefault(name, Target(original, parameter, self._work))
        return Target(original, self._stage(values), self._work)

    def _stage(self, values: Tensor) -> Tensor:
        """Memory for one composed tensor on its way to the pipeline."""
        memory = self._staged.get(values.dtype)
        if memory is None or memory.numel() < values.numel():
            memory = torch.empty(values.numel(), dtype=values.dtype, pin_memory=values.is_pinned())
            self._staged[values.dtype] = memory
        return memory[: values.numel()].view(values.shape)
