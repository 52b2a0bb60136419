"""Digests of tensors where they lie in their files, at the speed of the hash function, on every core there is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from overpaint.bases.container import DTYPES, Container
from overpaint.bases.digests import raw_bytes, tensor_beginning
from overpaint.bases.files import Place

BATCH = 32 << 20
"""Bytes that a thread takes at a time, if they are several tensors'. With fewer in all, no threads are started."""


def digests_of(
    places: Mapping[str, Place], containers: Mapping[Path, Container], threads: int | None = None
) -> dict[str, str]:
    """The digest of each tensor by canonical name, as `tensor_digest` gives it. Memory holds one window per thread.

    `threads`: None for as many as this process has cores. Raises BrokenFile when a file has become shorter.
    """
    batches = list(_batches(places))

    def digest(names: list[str]) -> dict[str, str]:
        return _digests({name: places[name] for name in names}, containers[places[names[0]].file])

    if threads == 1 or len(batches) < 2:
        found: Iterable[dict[str, str]] = map(digest, batches)
        return {name: text for part in found for name, text in part.items()}
    # hashlib lets go of the interpreter while it works.
    with ThreadPoolExecutor(threads or _cores()) as pool:
        return {name: text for part in pool.map(digest, batches) for name, text in part.items()}


def _batches(places: Mapping[str, Place]) -> Iterator[list[str]]:
    """The names in file order, cut where the file changes or enough bytes are together."""
    batch: list[str] = []
    size = 0
    for name in sorted(places, key=lambda name: (str(places[name].file), places[name].entry.start)):
        if batch and (size >= BATCH or places[name].file != places[batch[0]].file):
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += places[name].entry.size
    if batch:
        yield batch


def _digests(places: Mapping[str, Place], container: Container) -> dict[str, str]:
    sums = {n: hashlib.sha256(tensor_beginning(n, DTYPES[p.entry.dtype], p.shape)) for n, p in places.items()}
    straight = {name: place.entry for name, place in places.items() if not place.transposed}
    with closing(container.passing(straight)) as passing:
        for name, piece in passing:
            sums[name].update(piece)
    # What its file keeps the other way round is read whole.
    turned = {name: place.entry for name, place in places.items() if place.transposed}
    for name, stored in container.read(turned):
        sums[name].update(raw_bytes(places[name].canonical(stored)))
    return {name: found.hexdigest() for name, found in sums.items()}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
