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
from overpaint.patches.arithmetic import Original, Workspace
from overpaint.patches.arrays import identical
from overpaint.patches.compose import Plan, Term, plan
from overpaint.patches.parameters import Parameters, Seal


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
        self._seals: dict[str, Seal] = {}
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
            for held in (self._kept, self._seals, self._torn, self._staged):
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
        parameters = {name: self._parameters[name] for name in names}
        fresh: dict[str, Original] = {}
        seals: dict[str, Seal] = {}
        for name, parameter in parameters.items():
            seal = self._seals.get(name)
            if seal and seal.holds(parameter):
                continue
            original = self._kept.get(name)
            if original is None:
                fresh[name] = original = self._keep(self._plan.original(name), parameter)
            if name not in self._torn:
                self._compare(name, parameter, original)
            seals[name] = Seal(parameter)
        self._kept.update(fresh)
        self._seals.update(seals)
        return parameters

    def _compare(self, name: str, parameter: nn.Parameter, original: Original) -> None:
        expected = original.values
        if name in self._plan.stacks:
            expected = self._plan.write(name, original, torch.empty_like(expected))
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
        try:
            for name, parameter in parameters.items():
                self._torn.add(name)
                self._put(name, parameter, wanted)
            self._plan = wanted
        except BaseException:
            # What was there is composed again rather than remembered: the same bits, and no second copy of every weight.
            for name in sorted(self._torn):
                self._put(name, parameters[name], self._plan)
                self._torn.discard(name)
            raise
        self._torn.clear()

    def _put(self, name: str, parameter: nn.Parameter, wanted: Plan) -> None:
        original = self._kept[name]
        values = original.values
        if name not in wanted.stacks:
            parameter.copy_(values)
        elif parameter.device == values.device and parameter.dtype == values.dtype and parameter.is_contiguous():
            wanted.write(name, original, parameter)
        else:
            parameter.copy_(wanted.write(name, original, self._stage(values)))
        self._seals[name].renew(parameter)

    def _keep(self, original: Original, parameter: nn.Parameter) -> Original:
        return replace(original, values=original.values.pin_memory()) if parameter.is_cuda else original

    def _stage(self, values: Tensor) -> Tensor:
        """Memory for one composed tensor on its way to the pipeline."""
        memory = self._staged.get(values.dtype)
        if memory is None or memory.numel() < values.numel():
            memory = torch.empty(values.numel(), dtype=values.dtype, pin_memory=values.is_pinned())
            self._staged[values.dtype] = memory
        return memory[: values.numel()].view(values.shape)
