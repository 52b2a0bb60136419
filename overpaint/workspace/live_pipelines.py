"""Pipelines that follow a recipe: whatever is added to it or removed from it in this process, they carry at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from overpaint.core.errors import OverpaintError

if TYPE_CHECKING:
    from overpaint.bases.base import Base
    from overpaint.patches.compose import Term
    from overpaint.patches.live import Overlay

ATTRIBUTE = "_overpaint_overlay"
"""Where a pipeline keeps the overlay that changes it, so that both are freed together."""

ReadTerm: TypeAlias = "Callable[[str, float], Term]"
"""Reads a stored patch as a term of a composition: its id and its strength."""


class CannotFollow(OverpaintError):
    """A pipeline that carries a recipe and cannot take a change of it."""


class LivePipelines:
    """The pipelines of this process that carry recipes, by the name of the recipe; they are referred to weakly."""

    def __init__(self) -> None:
        self._overlays: dict[str, weakref.WeakSet[Overlay]] = {}

    def apply(self, recipe: str | None, pipe: Any, base: Base, strengths: Mapping[str, float], term: ReadTerm) -> None:
        """Make `pipe` carry these patches (strengths by id) and follow `recipe`, or nothing if None.

        Raises CannotFollow when the pipeline carries patches of another base, and what `Overlay` raises; the pipeline is
        then as it was.
        """
        from overpaint.patches.live import Overlay

        overlay: Overlay | None = getattr(pipe, ATTRIBUTE, None)
        if overlay is None:
            overlay = Overlay(_weakly(pipe), base)
        elif overlay.base.fingerprint != base.fingerprint:
            raise CannotFollow(
                f"the pipeline carries a recipe on the base {overlay.base.fingerprint[:12]}, and this one is on "
                f"{base.fingerprint[:12]}; load another pipeline"
            )
        overlay.set(_terms(overlay, strengths, term))
        setattr(pipe, ATTRIBUTE, overlay)
        self._forget(overlay)
        if recipe is not None:
            self._overlays.setdefault(recipe, weakref.WeakSet()).add(overlay)

    def release(self, pipe: Any) -> None:
        """Let go of a pipeline: it follows no recipe any more, and its weights stay as they are."""
        overlay: Overlay | None = getattr(pipe, ATTRIBUTE, None)
        if overlay is not None:
            delattr(pipe, ATTRIBUTE)
            self._forget(overlay)

    def release_all(self, recipe: str) -> None:
        """No pipeline follows `recipe` any more."""
        self._overlays.pop(recipe, None)

    @contextmanager
    def changing(self, recipe: str, strengths: Mapping[str, float], term: ReadTerm) -> Iterator[None]:
        """Make every pipeline of `recipe` carry these patches; all are as before when one cannot, or when the block raises.

        Raises CannotFollow.
        """
        changed: list[tuple[Overlay, tuple[Term, ...]]] = []
        try:
            for overlay in list(self._overlays.get(recipe, ())):
                before = overlay.terms
                try:
                    overlay.set(_terms(overlay, strengths, term))
                except OverpaintError as error:
                    raise CannotFollow(
                        f"a pipeline that follows the recipe {recipe!r} cannot take the change, so the recipe stays as it "
                        f"was: {error}; or let go of that pipeline with recipe.release(pipe)"
                    ) from error
                changed.append((overlay, before))
            yield
        except BaseException:
            for overlay, before in reversed(changed):
                overlay.set(before)
            raise

    def _forget(self, overlay: Overlay) -> None:
        for overlays in self._overlays.values():
            overlays.discard(overlay)


def _terms(overlay: Overlay, strengths: Mapping[str, float], term: ReadTerm) -> list[Term]:
    """Terms that the overlay carries already are taken from it, so that removing one reads no file."""
    carried = {(each.id, each.strength): each for each in overlay.terms}
    return [carried.get(each) or term(*each) for each in strengths.items()]


def _weakly(pipe: Any) -> Any:
    # The pipeline keeps its overlay; were it kept by it in turn, `del pipe` would free no memory until some later time.
    try:
        return weakref.proxy(pipe)
    except TypeError:
        return pipe
