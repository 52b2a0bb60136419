"""A composition live on a loaded pipeline: laid on, changed and taken off without loading anything again.

The base's values of the touched tensors are kept aside, and whatever lies on a tensor is composed from them anew;
nothing is ever subtracted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from overpaint.bases.base import Base
from overpaint.errors import NotFound, OverpaintError
from overpaint.patches.arrays import identical
from overpaint.patches.blocks import Original, Target, Workspace
from overpaint.patches.compose import Plan, Term, plan
from overpaint.patches.parameters import Parameters
from overpaint.patches.seals import Seals


class ForeignChange(OverpaintError):
    """Weights that somebody else changed since this overlay last wrote them."""


class Overlay:
    """Keeps a pipeline equal to `compose(base, terms)`, whatever was set before.

    Values are composed on the CPU in the base's own dtypes, the very bits that a build writes, and then cast and moved to
    where the pipeline has its parameters; these are written in place, so that compiled graphs and other holders of a module
    see them. The base's values of a tensor are read when it is first touched, compared with the pipeline, and kept until
    `close` (pinned when the pipeline is on a GPU); after that, no change reads a file.

    A failure leaves the pipeline bit for bit as it was. Raises ForeignChange when a tensor that is carried or wanted is not
    what this overlay or the base would have there (another overlay on a shared module counts as somebody else), BadPipeline
    when there is nothing to write to. Use it from one thread at a time, and not while the pipeline draws.
    """

    def __init__(self, pipe: Any, base: Base) -> None:
        self.base = base
        self._parameters: Parameters | None = Parameters(pipe, base)
        self._work = Workspace()
        self._plan = plan(base, (), self._work)
        self._kept: dict[str, Original] = {}
        self._targets: dict[str, Target] = {}
        self._seals = Seals()
        self._torn: set[str] = set()
        self._staged: dict[torch.dtype, Tensor] = {}

    @property
    def terms(self) -> tuple[Term, ...]:
        """What the pipeline carries, sorted by patch id."""
        return self._plan.terms

    @property
    def touched(self) -> list[str]:
        """Canonical names of the tensors that patches now lie on."""
        return self._plan.names

    def set(self, terms: Iterable[Term]) -> None:
        """Make the pipeline carry exactly these patches. Only tensors on which something else lies are computed again."""
        wanted, before = plan(self.base, terms, self._work), self._plan
        names = sorted(before.stacks.keys() | wanted.stacks.keys() | self._torn)
        parameters = self._check(names)
        lies = {name: (before.stacks.get(name), wanted.stacks.get(name)) for name in names}
        # Once for each pair of stacks: telling two thousand patches apart tensor by tensor would take longer than to write.
        same = {(a, b): a is not None and b is not None and a.pieces == b.pieces for a, b in set(lies.values())}
        changed = [name for name in names if name in self._torn or not same[lies[name]]]
        self._write({name: parameters[name] for name in changed}, wanted)

    def add(self, term: Term) -> None:
        """Lay one patch on, or give one that lies there another strength."""
        self.set([*(t for t in self.terms if t.id != term.id), term])

    def remove(self, patch_id: str) -> None:
        """Take one patch off. Raises NotFound when it does not lie there."""
        if all(term.id != patch_id for term in self.terms):
            raise NotFound(f"patch {patch_id[:12]} does not lie on this pipeline, so it cannot be taken off")
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
        self._seals.clear()
        self._check(self.touched)

    def close(self) -> None:
        """Give the base's weights back and let go of the pipeline and of everything kept; closing twice is closing once.

        Lets go also when the weights cannot be given back because somebody else changed them.
        """
        if self._parameters is None:
            return
        try:
            self.clear()
        finally:
            self._parameters, self._work = None, Workspace()
            self._plan = plan(self.base, (), self._work)
            for held in (self._kept, self._targets, self._seals, self._torn, self._staged):
                held.clear()

    def __enter__(self) -> Overlay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """The parameters of these names, after making sure that they hold what they should and can be written to."""
        if self._parameters is None:
            raise OverpaintError("this overlay is closed; make a new one")
        self._parameters.check_components()
        parameters = self._parameters.of(names)
        changed = {name: parameters[name] for name in self._seals.broken(parameters)}
        fresh: dict[str, Original] = {}
        for name, parameter in changed.items():
            original = self._kept.get(name)
            if original is None:
                fresh[name] = original = self._keep(self._plan.original(name), parameter)
            if name not in self._torn:
                self._compare(name, parameter, original)
        self._kept.update(fresh)
        if changed:
            self._seals.put(changed)
            for name in changed:
                self._targets.pop(name, None)
        return parameters

    @torch.inference_mode()
    def _compare(self, name: str, parameter: nn.Parameter, original: Original) -> None:
        expected = original.values
        if name in self._plan.stacks:
            expected = torch.empty_like(expected)
            self._plan.write(name, Target(original, expected, self._work))
        if not identical(parameter.detach().cpu(), expected.to(parameter.dtype)):
            raise ForeignChange(
                f"{name} is not what {'Overpaint left there' if name in self._kept else 'the base has there'}: something "
                "else (a LoRA, a fine-tune, another overlay) changed it; undo that, or load the pipeline again and apply "
                "the recipe first"
            )

    # Weights from inference mode may be written in inference mode only, and others in it as well.
    @torch.inference_mode()
    def _write(self, parameters: dict[str, nn.Parameter], wanted: Plan) -> None:
        """Write all tensors or none."""
        self._torn.update(parameters)
        try:
            self._put(parameters, wanted)
            self._plan = wanted
        except BaseException:
            # What was there is composed again rather than remembered: the same bits, and no second copy of every weight.
            self._put(parameters, self._plan)
            self._torn.clear()
            raise
        self._torn.clear()

    def _put(self, parameters: dict[str, nn.Parameter], wanted: Plan) -> None:
        for name, parameter in parameters.items():
            if name not in wanted.stacks:
                parameter.copy_(self._kept[name].values)
                continue
            target = self._targets.get(name) or self._target(name, parameter)
            wanted.write(name, target)
            if target.out is not parameter:
                parameter.copy_(target.out)
        self._seals.renew(parameters)

    def _target(self, name: str, parameter: nn.Parameter) -> Target:
        """The parameter itself, where composed values can be written to it as they are, or memory on the way to it."""
        original = self._kept[name]
        values = original.values
        if parameter.device == values.device and parameter.dtype == values.dtype and parameter.is_contiguous():
            return self._targets.setdefault(name, Target(original, parameter, self._work))
        return Target(original, self._stage(values), self._work)

    def _keep(self, original: Original, parameter: nn.Parameter) -> Original:
        return replace(original, values=original.values.pin_memory()) if parameter.is_cuda else original

    def _stage(self, values: Tensor) -> Tensor:
        """Memory for one composed tensor on its way to the pipeline."""
        memory = self._staged.get(values.dtype)
        if memory is None or memory.numel() < values.numel():
            memory = torch.empty(values.numel(), dtype=values.dtype, pin_memory=values.is_pinned())
            self._staged[values.dtype] = memory
        return memory[: values.numel()].view(values.shape)
