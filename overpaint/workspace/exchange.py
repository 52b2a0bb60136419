"""Sharing for a workshop: what `transport` does, with the workshop's keys, vocabularies and its reading of patches."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overpaint.core.errors import OverpaintError
from overpaint.core.progress import Progress, silent
from overpaint.registry.records import PatchRecord
from overpaint.registry.sharing import ingest, sending
from overpaint.registry.sharing.ingest import PullRequest, Received
from overpaint.registry.sharing.sending import Sent
from overpaint.registry.sharing.signing import Keyring, load_keyring, load_signer

if TYPE_CHECKING:
    from overpaint.core.concepts import Concept
    from overpaint.patches.compose import Term
    from overpaint.patches.formats.exporting import Exported
    from overpaint.patches.formats.importing import Imported, Options
    from overpaint.workspace.opened import OpenRegistry


# Patches from and for other tools, in a registry: a foreign file becomes a stored patch, patches become a foreign file.

SOLVER = "import"
"""What stands in a patch's record where others have the solver that made them."""


@dataclass(frozen=True)
class ImportedPatch:
    """A patch that was imported and stored, and what was found in the file."""

    record: PatchRecord
    found: Imported


def import_patch(
    workspace: OpenRegistry,
    file: Path,
    *,
    base: str,
    concept: Concept,
    options: Options,
    progress: Progress,
) -> ImportedPatch:
    """Store another tool's erasure as a patch.

    Raises OverpaintError before anything is stored.
    """
    from overpaint.patches.formats.importing import import_weights
    from overpaint.patches.patch import make_patch

    opened, started = workspace.base(base), time.perf_counter()
    found = import_weights(opened, file, options, report=progress)
    settings = {"file": file.name, **found.settings()}
    patch = make_patch(opened, concept, found.delta, {"name": SOLVER, "settings": settings, "seed": 0, "universe": []})
    workspace.registry.ensure_concept(concept)
    record = workspace.registry.add_patch(
        id=patch.id,
        blob=patch.blob,
        concept=concept.name,
        base=base,
        solver=SOLVER,
        kind=patch.delta.kind,
        settings=settings,
        seed=0,
        seconds=time.perf_counter() - started,
    )
    return ImportedPatch(record, found)


def export_patches(
    workspace: OpenRegistry,
    keys: Iterable[str],
    out: Path,
    format: str,
    strength: float,
    *,
    dtype: str,
    truncate: int | None,
    progress: Progress,
) -> Exported:
    """Write patches (by id, beginning of an id, or concept) of one base, all at one strength, as one file of a format."""
    records = list({record.id: record for record in (workspace.registry.patch(key) for key in keys)}.values())
    if len(bases := sorted({record.base for record in records})) != 1:
        raise OverpaintError(f"one file is for one base; these patches are for {', '.join(bases) or 'none'}")
    terms = [workspace.term(record.id, strength, bases[0]) for record in records]
    return _exported(
        workspace, bases[0], terms, records, out, format, out.stem, dtype=dtype, truncate=truncate, progress=progress
    )


def export_recipe(
    workspace: OpenRegistry,
    name: str,
    out: Path,
    format: str,
    *,
    dtype: str,
    truncate: int | None,
    progress: Progress,
) -> Exported:
    """Write a recipe as one file of a format."""
    recipe = workspace.registry.recipe(name)
    records = [record for record, _ in workspace.registry.patches_on(name)]
    terms = workspace.terms(recipe)
    return _exported(
        workspace, recipe.base, terms, records, out, format, name, dtype=dtype, truncate=truncate, progress=progress
    )


def _exported(
    workspace: OpenRegistry,
    base: str,
    terms: list[Term],
    records: list[PatchRecord],
    out: Path,
    format: str,
    title: str,
    *,
    dtype: str,
    truncate: int | None,
    progress: Progress,
) -> Exported:
    from overpaint.patches.formats.exporting import About, export

    concepts = {record.id: record.concept for record in records}
    day = max((record.solved_at.date().isoformat() for record in records), default="")
    patches = [(term.id, concepts[term.id], term.strength) for term in sorted(terms, key=lambda term: term.id)]
    about = About(title, patches, day)
    return export(workspace.base(base), terms, out, format, about, dtype=dtype, truncate=truncate, report=progress)


def export_archive(workspace: OpenRegistry, file: Path, *, sign: Path | None = None, **what: Any) -> Sent:
    """See `Workspace.export`."""
    signer = load_signer(sign) if sign else None
    return sending.export(workspace.registry, file, signer=signer, vocabularies=workspace.vocabularies, **what)


def push(
    workspace: OpenRegistry, destination: str | Path, *, sign: Path | None = None, progress: Progress, **what: Any
) -> Sent:
    """See `Workspace.push`."""
    signer = load_signer(sign) if sign else None
    return sending.push(
        workspace.registry, destination, signer=signer, vocabularies=workspace.vocabularies, report=progress, **what
    )


def import_file(workspace: OpenRegistry, file: Path, **asked: Any) -> Received:
    """See `Workspace.import_file`."""
    return ingest.import_file(workspace.registry, file, _request(workspace, **asked))


def pull(workspace: OpenRegistry, source: str | Path, **asked: Any) -> Received:
    """See `Workspace.pull`."""
    return ingest.pull(workspace.registry, source, _request(workspace, **asked))


def _keyring(trust: Iterable[str | Path] | None) -> Keyring | None:
    """The keys to trust; None asks for no verification. Raises OverpaintError for an empty list, an empty path, one string."""
    if trust is None:
        return None
    if isinstance(trust, (str, Path)):
        raise OverpaintError(
            f"trust is a list of .pub files or folders, not {str(trust)!r}; write trust=[{str(trust)!r}]"
        )
    paths = list(trust)
    if not paths or not all(str(path).strip() for path in paths) or Path("") in paths:
        raise OverpaintError(
            "no key to trust was named, so nothing could be verified; name .pub files or folders of them, or ask for no "
            "verification in so many words: --no-verify, or trust=None"
        )
    return load_keyring(Path(path) for path in paths)


def _request(
    workspace: OpenRegistry,
    *,
    trust: Iterable[str | Path] | None = None,
    progress: Progress = silent,
    **asked: Any,
) -> PullRequest:
    """A request in which every patch is also read as this program reads patches: its kind, its shapes, its values."""
    # Whoever only sends waits for no torch.
    from overpaint.patches.patch import read_patch
    from overpaint.solvers.vocabulary import read as read_vocabulary

    return PullRequest(
        trusted=_keyring(trust),
        check=read_patch,
        check_vocabulary=read_vocabulary,
        vocabularies=workspace.vocabularies,
        report=progress,
        **asked,
    )
