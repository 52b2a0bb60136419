"""One base in memory that draws under any recipe: what a picture is asked for, the queue, and the thread that draws.

Which patches a picture gets is read from the registry when its drawing begins, so that a change reaches every picture that is
begun after it, also those that wait; a picture that has begun is finished under what it began with. One thread owns the pipeline:
it alone swaps and draws. Each picture is drawn by itself, so equal requests give equal pixels, whatever else is asked for.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from overpaint.bases.loading import resolve_device
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.evaluation.images import Sampler, generate
from overpaint.patches.compose import Term, compose, composition_digest
from overpaint.patches.live import Overlay
from overpaint.registry.history import today
from overpaint.serving.access import TryLater
from overpaint.workspace.workspace import Workspace

MOST_IN_A_ROW = 16
"""How many pictures are drawn under the same patches, one after the other, while pictures under other patches wait."""
MOST_DIGESTS = 4096
"""How many sets of patches have the digest of their weights remembered."""
LARGEST_AREA = 2.25
"""How large a picture may be, in areas of the base's own pictures: 768 x 768 where those are 512 x 512."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class QueueFull(TryLater):
    """More pictures than may wait."""


class Stopping(OverpaintError):
    """A picture that is not drawn because the server stops."""


class OtherBase(OverpaintError):
    """A recipe or a patch for another base than the one that is served."""


class BaseReplaced(OverpaintError):
    """The base in memory is no longer one of the registry's."""


@dataclass(frozen=True)
class PictureRequest:
    """One picture that is asked for: under a recipe (NAME or NAME@REVISION), or else under patches with strengths.

    Patches are named as `Registry.patch` takes them. `guidance` None is the base's own, `size` (width, height) None the
    base's own.
    """

    prompt: str
    seed: int
    steps: int = 20
    guidance: float | None = None
    size: tuple[int, int] | None = None
    recipe: str | None = None
    patches: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class PatchSet:
    """The patches that a picture is drawn under: (id, strength), sorted; and the recipe and revision that they are from."""

    strengths: tuple[tuple[str, float], ...]
    recipe: str | None = None
    revision: int | None = None


@dataclass(frozen=True, eq=False)
class Drawn:
    """A picture, uint8 [height, width, 3], with the digest of the weights that drew it and the patches they have."""

    pixels: NDArray[np.uint8]
    weights: str
    patch_set: PatchSet
    wanted: PictureRequest
    guidance: float


class Meter(Protocol):
    """Counts the work: seconds of a change from one set of patches to another, seconds of a picture."""

    def swapped(self, seconds: float) -> None: ...

    def drew(self, recipe: str | None, seconds: float) -> None: ...


class Painter:
    """A base of a registry and its pipeline. `select` may be called from any thread, `draw` from one at a time.

    With `enforce_expiry`, patches that have expired are removed from a recipe, with a line in its history, before it is drawn
    with.
    """

    def __init__(
        self,
        workspace: Workspace,
        base_name: str,
        *,
        device: str = "auto",
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        enforce_expiry: bool = False,
        meter: Meter | None = None,
    ) -> None:
        self.workspace, self.enforce_expiry = workspace, enforce_expiry
        self._asked_for, self._meter = base_name, meter
        self.base = workspace.base(base_name)
        self._pipe = self.base.pipeline(device=str(resolve_device(device)), dtype=DTYPES[dtype])
        self._overlay = Overlay(self._pipe, self.base)
        self._applied: tuple[tuple[str, float], ...] | None = ()
        self._digests: OrderedDict[tuple[tuple[str, float], ...], str] = OrderedDict({(): self.base.fingerprint})

    @property
    def base_names(self) -> set[str]:
        """The names that the registry has for the loaded base now: none once it was removed, or replaced under its name."""
        return {each.name for each in self.workspace.bases() if each.fingerprint == self.base.fingerprint}

    @property
    def base_name(self) -> str:
        """The name that was asked for, or another one of the same base where that is gone. Raises BaseReplaced."""
        return self.names_now()[0]

    def names_now(self) -> tuple[str, set[str]]:
        """`base_name` and `base_names`, of one look at the registry. Raises BaseReplaced."""
        names = self.base_names
        if not names:
            raise BaseReplaced(
                f"the base that this server loaded as {self._asked_for!r} (fingerprint {self.base.fingerprint[:12]}) is no "
                "longer in the registry; start the server again with a base that is"
            )
        return self._asked_for if self._asked_for in names else min(names), names

    @property
    def natural_size(self) -> int | None:
        """Width and height of the base's own pictures; None where its pipeline does not tell."""
        unet = getattr(self._pipe, "unet", None)
        cells = unet.config.sample_size if unet is not None else getattr(self._pipe, "default_sample_size", None)
        return cells * self._pipe.vae_scale_factor if isinstance(cells, int) else None

    def check_size(self, size: tuple[int, int] | None) -> None:
        """Raise OverpaintError for a size that the base cannot draw."""
        if size is None:
            return
        natural = self.natural_size
        if natural is None:
            raise OverpaintError('pictures of this base have one size; leave `size` out, or give "auto"')
        step = math.lcm(8, self._pipe.vae_scale_factor)
        fits = all(side % step == 0 and side >= natural / 2 for side in size)
        if not fits or size[0] * size[1] > LARGEST_AREA * natural**2:
            raise OverpaintError(
                f"this base draws {natural} x {natural} pixels, or multiples of {step} from {math.ceil(natural / 2)} on with "
                f"at most {LARGEST_AREA} times the area; got {size[0]} x {size[1]}"
            )

    def select(self, wanted: PictureRequest) -> PatchSet:
        """The patches of a recipe as it is now, or of a set, all of the served base.

        Raises NotFound with the nearest name, OtherBase, BaseReplaced, OverpaintError for a patch that is named twice.
        """
        registry, (base_name, names) = self.workspace.registry, self.names_now()
        if wanted.recipe is None:
            return self._named(wanted.patches, base_name, names)
        record = registry.recipe(wanted.recipe)
        if (
            self.enforce_expiry
            and registry.has_recipe(wanted.recipe)
            and any(each.has_expired(today()) for each in record.entries)
        ):
            self.remove_expired(record.name)
            record = registry.recipe(wanted.recipe)
        _check_base(record.base, base_name, names, f"the recipe {record.name!r}")
        return PatchSet(record.patches, record.name, record.revision)

    def remove_expired(self, recipe: str | None = None) -> None:
        """Take what has expired off the recipes of the served base, or off one."""
        for name in dict.fromkeys(each.recipe for each in self.workspace.due(recipe=recipe)):
            with suppress(NotFound):  # another worker was faster
                if self.workspace.registry.recipe(name).base in self.base_names:
                    self.workspace.recipe(name).remove_expired(why="expired", who="overpaint serve")

    def draw(self, wanted: PictureRequest) -> Drawn:
        """Draw one picture under what its recipe holds now. Raises as `select`, and LostPatch where bytes are lost."""
        selected = self.select(wanted)
        terms = [self.workspace.term_on(*each, self.base) for each in selected.strengths]
        digest = self._digest(selected.strengths, terms)
        if self._applied != selected.strengths:
            started = time.perf_counter()
            self._applied = None
            self._overlay.set(terms)
            self._applied = selected.strengths
            if self._meter is not None:
                self._meter.swapped(time.perf_counter() - started)
        sampler = Sampler.of(self.base, wanted.steps, wanted.guidance, batch=1, size=wanted.size)
        started = time.perf_counter()
        (pixels,) = generate(self._pipe, [wanted.prompt], [wanted.seed], sampler)
        if self._meter is not None:
            self._meter.drew(selected.recipe, time.perf_counter() - started)
        return Drawn(pixels, digest, selected, wanted, sampler.guidance)

    def _named(self, patches: Sequence[tuple[str, float]], base_name: str, names: set[str]) -> PatchSet:
        strengths: dict[str, float] = {}
        for key, strength in patches:
            record = self.workspace.registry.patch(key, base=base_name)
            _check_base(record.base, base_name, names, f"the patch {record.id[:12]} ({record.concept})")
            if record.id in strengths:
                raise OverpaintError(f"the patch {record.id[:12]} ({record.concept}) is named twice; name it once")
            strengths[record.id] = strength
        return PatchSet(tuple(sorted(strengths.items())))

    def _digest(self, key: tuple[tuple[str, float], ...], terms: Sequence[Term]) -> str:
        digest = self._digests.get(key) or composition_digest(self.base, compose(self.base, terms))
        self._digests[key] = digest
        self._digests.move_to_end(key)
        if len(self._digests) > MOST_DIGESTS:
            self._digests.popitem(last=False)
        return digest


def _check_base(name: str, served: str, names: set[str], what: str) -> None:
    if name not in names:
        raise OtherBase(
            f"{what} is for the base {name!r}, and this server draws with {served!r}; ask the server of that base"
        )


@dataclass(eq=False)
class Job:
    """A picture that waits, the patches it will probably get, and where it goes."""

    wanted: PictureRequest
    key: tuple[tuple[str, float], ...]
    done: Future[Drawn] = field(default_factory=Future)


class PictureQueue:
    """Pictures that wait, and the thread that draws them: those under the same patches together, and no one for ever.

    After MOST_IN_A_ROW pictures under the same patches the oldest that waits is next. `limit` is how many may wait.
    """

    def __init__(self, draw: Callable[[PictureRequest], Drawn], limit: int) -> None:
        self._draw, self._limit = draw, limit
        self._waiting: deque[Job] = deque()
        self._change = threading.Condition()
        self._stopping = False
        self._key: tuple[tuple[str, float], ...] | None = None
        self._in_a_row = 0
        self._seconds = 1.0
        self._thread = threading.Thread(target=self._work, name="overpaint-drawing", daemon=True)

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        """Whether pictures are being drawn."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to draw."""
        self._thread.start()

    def put(
        self, wanted: Sequence[tuple[PictureRequest, PatchSet]], admit: Callable[[], None] = lambda: None
    ) -> list[Future[Drawn]]:
        """Let pictures wait, all or none. Raises QueueFull, Stopping, OverpaintError for more than may ever wait.

        `admit` is called once there is room for them, and may refuse them by raising.
        """
        jobs = [Job(each, selected.strengths) for each, selected in wanted]
        if len(jobs) > self._limit:
            raise OverpaintError(
                f"{len(jobs)} pictures in one request, and at most {self._limit} may wait; ask for fewer"
            )
        with self._change:
            if self._stopping:
                raise Stopping("the server is stopping; ask again in a moment")
            if len(self._waiting) + len(jobs) > self._limit:
                raise QueueFull(
                    f"{len(self._waiting)} pictures wait already, and at most {self._limit} may; ask again later",
                    max(1.0, len(self._waiting) * self._seconds),
                )
            admit()
            self._waiting.extend(jobs)
            self._change.notify()
        return [job.done for job in jobs]

    def stop(self, seconds: float = 60.0) -> None:
        """Draw no more: what waits gets Stopping, what is being drawn is finished, if that takes no longer than `seconds`."""
        with self._change:
            self._stopping = True
            waiting, self._waiting = list(self._waiting), deque()
            self._change.notify()
        for job in waiting:
            if job.done.set_running_or_notify_cancel():
                job.done.set_exception(Stopping("the server is stopping; ask again in a moment"))
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            if not job.done.set_running_or_notify_cancel():
                continue
            started = time.monotonic()
            try:
                job.done.set_result(self._draw(job.wanted))
            except BaseException as error:
                job.done.set_exception(error)
            self._seconds = 0.8 * self._seconds + 0.2 * (time.monotonic() - started)

    def _next(self) -> Job | None:
        """The picture to draw now, as soon as there is one; None when the server stops."""
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._stopping)
            if self._stopping:
                return None
            job = self._waiting[0]
            if self._in_a_row < MOST_IN_A_ROW:
                job = next((each for each in self._waiting if each.key == self._key), job)
            self._in_a_row = self._in_a_row + 1 if job.key == self._key and self._in_a_row < MOST_IN_A_ROW else 1
            self._key = job.key
            self._waiting.remove(job)
            return job
