"""A composition live on a loaded pipeline: laid on, changed and taken off without loading anything again.

The pristine values of the touched tensors are kept aside and copied back; nothing is ever subtracted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from overpaint.bases.base import Base
from overpaint.errors import OverpaintError
from overpaint.patches.compose import Term, compose


class ForeignChange(OverpaintError):
    """Weights that somebody else changed since this overlay last wrote them."""


class Overlay:
    """Keeps a pipeline equal to `compose(base, terms)`, whatever was set before.

    Raises ForeignChange when the pipeline's touched weights are not what this overlay left there; OverpaintError when
    the pipeline lacks a tensor that a patch names. A failure leaves the pipeline as it was.
    """

    def __init__(self, pipe: Any, base: Base) -> None:
        self.base = base
        self._parameters = dict(_parameters(pipe, base))
        self._pristine: dict[str, Tensor] = {}
        self._current: dict[str, Tensor] = {}

    @property
    def touched(self) -> list[str]:
        """Canonical names of the tensors that now differ from the base's files."""
        return sorted(self._current)

    def set(self, terms: Iterable[Term]) -> None:
        """Make the pipeline carry exactly these patches."""
        wanted = compose(self.base, terms)
        missing = sorted(set(wanted) - set(self._parameters))
        if missing:
            raise OverpaintError(
                f"the pipeline lacks {len(missing)} of {len(wanted)} patched tensors, first {missing[0]}"
            )
        changed = {n: t for n, t in wanted.items() if not (n in self._current and torch.equal(self._current[n], t))}
        dropped = [n for n in self._current if n not in wanted]
        self._refuse_foreign([*changed, *dropped])
        self._write({**changed, **dict.fromkeys(dropped)})

    def clear(self) -> None:
        """Give the base's weights back."""
        self.set(())

    @contextmanager
    def applied(self, terms: Iterable[Term]) -> Iterator[None]:
        """Carry these patches within the block, then none."""
        self.set(terms)
        try:
            yield
        finally:
            self.clear()

    def _refuse_foreign(self, names: Iterable[str]) -> None:
        for name in names:
            parameter = self._parameters[name]
            expected = self._current[name] if name in self._current else self.base.tensor(name)
            if not torch.equal(parameter.detach().cpu(), expected.to(parameter.dtype)):
                raise ForeignChange(
                    f"{name} is not what Overpaint left there: something else (a LoRA, a fine-tune) changed it; "
                    "reload the pipeline and apply the recipe first"
                )

    def _write(self, values: dict[str, Tensor | None]) -> None:
        before = {name: self._parameters[name].detach().clone() for name in values}
        try:
            for name, value in values.items():
                if name not in self._pristine:
                    self._pristine[name] = before[name]
                source = self._pristine[name] if value is None else value
                with torch.no_grad():
                    self._parameters[name].copy_(source)
        except BaseException:
            with torch.no_grad():
                for name, value_before in before.items():
                    self._parameters[name].copy_(value_before)
            raise
        for name, value in values.items():
            if value is None:
                self._current.pop(name)
                del self._pristine[name]
            else:
                self._current[name] = value


def _parameters(pipe: Any, base: Base) -> Iterator[tuple[str, nn.Parameter]]:
    """The pipeline's parameters by canonical name."""
    for component, layout in base.layout.components.items():
        module = getattr(pipe, component, None)
        if isinstance(module, nn.Module):
            for key, parameter in module.named_parameters():
                # torch.compile wraps a module and puts this in front of every name.
                yield f"{component}/{layout.canonical(key.removeprefix('_orig_mod.'))}", parameter
