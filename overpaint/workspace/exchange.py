"""What comes from elsewhere and goes elsewhere: other tools' files become patches, patches become other tools' files.

Also what a workspace asks of patches and recipes that others share: the keys it trusts, and that every patch can be read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overpaint.core.reporting import Progress
from overpaint.registry.records import PatchRecord
from overpaint.registry.sharing.ingest import PullRequest
from overpaint.registry.sharing.signing import load_keyring

if TYPE_CHECKING:
    from overpaint.core.concepts import Concept
    from overpaint.patches.formats.exporting import Exported
    from overpaint.patches.formats.importing import Imported, Options
    from overpaint.workspace.opened import OpenRegistry

SOLVER = "import"
"""What stands in a patch's record where others have the solver that made them."""


@dataclass(frozen=True)
class ImportedPatch:
    """A patch that was imported and stored, and what was found in the file."""

    record: PatchRecord
    found: Imported


def import_patch(
    opened: OpenRegistry, file: Path, *, base: str, concept: Concept, options: Options, progress: Progress
) -> ImportedPatch:
    """Store another tool's erasure as a patch. Raises OverpaintError before anything is stored."""
    from overpaint.patches.formats.importing import import_weights
    from overpaint.patches.patch import make_patch
    from overpaint.workspace.solving import store_patch

    onto, started = opened.base(base), time.perf_counter()
    imported = import_weights(onto, file, options, report=progress)
    settings = {"file": file.name, **imported.settings()}
    patch = make_patch(onto, concept, imported.delta, {"name": SOLVER, "settings": settings, "seed": 0, "universe": []})
    opened.registry.add_concept(concept, exist_ok=True)
    return ImportedPatch(store_patch(opened.registry, patch, base, time.perf_counter() - started), imported)


def export_patches(
    opened: OpenRegistry,
    base: str,
    patches: Sequence[tuple[PatchRecord, float]],
    out: Path,
    format: str | None,
    title: str,
    *,
    for_: str | None,
    dtype: str,
    truncate: int | None,
    progress: Progress,
) -> Exported:
    """Write patches of one base, each with its strength, as one new file of a format that other tools load."""
    from overpaint.patches.formats.exporting import About, export

    onto = opened.base(base)
    terms = [opened.term_on(record.id, strength, onto) for record, strength in patches]
    listed = sorted((record.id, record.concept, strength) for record, strength in patches)
    about = About(title, listed, max((record.solved_at.date().isoformat() for record, _ in patches), default=""))
    return export(onto, terms, out, format, about, for_=for_, dtype=dtype, truncate=truncate, report=progress)


def pull_request(
    vocabularies: Path,
    *,
    patches: Iterable[str],
    recipes: Iterable[str],
    name: str | None,
    trust: Iterable[str | Path] | None,
    accept_older: bool = False,
    progress: Progress,
    warn: Callable[[str], None],
) -> PullRequest:
    """A request in which every patch is also read as this program reads patches: its kind, its shapes, its values."""
    # Whoever only sends waits for no torch.
    from overpaint.patches.patch import read_patch
    from overpaint.solvers.vocabulary import read_vocabulary

    return PullRequest(
        patches=patches,
        recipes=recipes,
        trusted=None if trust is None else load_keyring(trust),
        name=name,
        accept_older=accept_older,
        check=read_patch,
        vocabularies=vocabularies,
        check_vocabulary=read_vocabulary,
        progress=progress,
        warn=warn,
    )
