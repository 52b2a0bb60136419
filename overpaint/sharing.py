"""Sharing for a workshop: what `transport` does, with the workshop's keys, vocabularies and its reading of patches."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overpaint.transport import importing, receiving, sending
from overpaint.transport.receiving import Received, Request
from overpaint.transport.sending import Sent
from overpaint.transport.signing import load_keyring, load_signer

if TYPE_CHECKING:
    from overpaint.workshop import Workshop


def export(shop: Workshop, file: Path, *, sign: Path | None = None, **what: Any) -> Sent:
    """See `Workshop.export`."""
    signer = load_signer(sign) if sign else None
    return sending.export(shop.registry, file, signer=signer, vocabularies=shop.vocabularies, **what)


def push(shop: Workshop, destination: str | Path, *, sign: Path | None = None, **what: Any) -> Sent:
    """See `Workshop.push`."""
    signer = load_signer(sign) if sign else None
    return sending.push(shop.registry, destination, signer=signer, vocabularies=shop.vocabularies, **what)


def import_file(shop: Workshop, file: Path, **asked: Any) -> Received:
    """See `Workshop.import_file`."""
    return importing.import_file(shop.registry, file, _request(shop, **asked))


def pull(shop: Workshop, source: str | Path, **asked: Any) -> Received:
    """See `Workshop.pull`."""
    return receiving.pull(shop.registry, source, _request(shop, **asked))


def _request(shop: Workshop, *, trust: Iterable[Path] = (), **asked: Any) -> Request:
    """A request in which every patch is also read as this program reads patches: its kind, its shapes, its values."""
    # Whoever only sends waits for no torch.
    from overpaint.patches.patch import read_patch
    from overpaint.solvers.vocabulary_file import read as read_vocabulary

    keys = [Path(path) for path in trust]
    return Request(
        trusted=load_keyring(keys) if keys else None,
        check=read_patch,
        check_vocabulary=read_vocabulary,
        vocabularies=shop.vocabularies,
        **asked,
    )
