"""Encoded vocabularies, shared beside patches: hours of a large text encoder's work, and nothing that cannot be done again.

They go with everything, not with chosen patches. What is damaged, not signed as asked, or here already is left out, with
notice: a registry lacks nothing without it but time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from overpaint.core.errors import OverpaintError
from overpaint.registry.sharing.documents import (
    NAME,
    VOCABULARY,
    BadLayout,
    Descriptor,
    Document,
    read_document,
    vocabulary_document,
)
from overpaint.registry.sharing.layout import OciLayout
from overpaint.registry.sharing.trust import Trust
from overpaint.registry.store import DIGEST

LIMIT = 1 << 30
"""The most bytes that one may have: twelve sentences of a text encoder 2,048 wide are 200 MB."""
SUFFIX = ".safetensors"


def kept(folder: Path) -> list[Path]:
    """The whole vocabularies of a folder, sorted."""
    return sorted(file for file in folder.glob(f"*{SUFFIX}") if DIGEST.fullmatch(file.stem)) if folder.is_dir() else []


def documents(folder: Path) -> Iterable[tuple[Document, str, bytes]]:
    """For each whole vocabulary of a folder its document, its name and its bytes."""
    for file in kept(folder):
        data = file.read_bytes()
        yield vocabulary_document(data), file.stem, data


def take(
    layout: OciLayout,
    entries: Sequence[Descriptor],
    folder: Path,
    check: Callable[[Path], object],
    trust: Trust | None,
    warn: Callable[[str], None],
) -> int:
    """Put the vocabularies that a layout lists and the folder lacks there; returns how many bytes were read.

    `check` is called with each file, under its name in a place of its own, and raises OverpaintError if it will not do.
    """
    nbytes = 0
    for entry in entries:
        name = entry.annotations.get(NAME, "")
        if entry.artifact_type != VOCABULARY or not DIGEST.fullmatch(name) or (folder / f"{name}{SUFFIX}").exists():
            continue
        try:
            if trust is not None:
                trust.require(entry.digest, f"the vocabulary {name[:12]}")
            nbytes += _take(layout, entry, folder / f"{name}{SUFFIX}", check)
        except (OverpaintError, OSError) as error:
            warn(f"the vocabulary {name[:12]} was left out, and is computed when it is needed: {error}")
    return nbytes


def _take(layout: OciLayout, entry: Descriptor, target: Path, check: Callable[[Path], object]) -> int:
    where = f"the document {entry.digest} of {layout.where}"
    layers = read_document(layout.document(entry), where).get("layers")
    if not isinstance(layers, list) or len(layers) != 1:
        raise BadLayout(f"{where} is not that of one vocabulary")
    blob = Descriptor.from_json(layers[0], where)
    if blob.size > LIMIT:
        raise BadLayout(f"{where} claims {blob.size} bytes, and a vocabulary has at most {LIMIT}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        file = Path(scratch) / target.name
        file.write_bytes(layout.blob(blob.digest, blob.size))
        check(file)
        file.replace(target)
    return blob.size
