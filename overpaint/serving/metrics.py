"""What Prometheus reads: pictures, swaps, seconds and refusals, of one process or of all workers together."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from overpaint.serving.access import METRICS_FOLDER

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Counts what a process does; what `drawing.Meter` asks for."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._pictures = Counter("overpaint_pictures", "Pictures drawn, by recipe", ["recipe"], registry=registry)
        self._drawing = Histogram("overpaint_draw_seconds", "Drawing one picture", buckets=_SECONDS, registry=registry)
        self._swaps = Histogram(
            "overpaint_swap_seconds", "Changing from one set of patches to another", buckets=_SECONDS, registry=registry
        )
        self._refusals = Counter("overpaint_refusals", "Requests refused, by kind", ["kind"], registry=registry)
        self._waiting = Gauge("overpaint_waiting", "Pictures that wait", registry=registry, multiprocess_mode="livesum")

    def swapped(self, seconds: float) -> None:
        """The weights were changed."""
        self._swaps.observe(seconds)

    def drew(self, recipe: str | None, seconds: float) -> None:
        """A picture was drawn, under a recipe or under patches that were named."""
        self._pictures.labels(recipe or "").inc()
        self._drawing.observe(seconds)

    def refused(self, kind: str) -> None:
        """A request was refused."""
        self._refusals.labels(kind).inc()

    def page(self, waiting: int) -> tuple[bytes, str]:
        """Everything in Prometheus's text format, and its media type."""
        self._waiting.set(waiting)
        registry = self._registry
        if METRICS_FOLDER in os.environ:
            _forget_dead(Path(os.environ[METRICS_FOLDER]))
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry), CONTENT_TYPE_LATEST


def _forget_dead(folder: Path) -> None:
    """A killed worker has no pictures waiting; what it counted stays."""
    for file in folder.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        with suppress(PermissionError):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                mark_process_dead(pid)  # type: ignore[no-untyped-call]
