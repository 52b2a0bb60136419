"""What comes from elsewhere and goes elsewhere: other tools' files become patches, patches become other tools' files.

Also what a workspace asks of patches and recipes that others share, the keys it trusts and that every patch can be read; and
what a repository on the Hub has beside the patches: a card, and LoRA files that other programs load as they are.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from overpaint.core.errors import OverpaintError
from overpaint.core.reporting import Progress
from overpaint.registry.records import PatchRecord
from overpaint.registry.sharing.documents import NAME, PATCH, RECIPE, REF, Descriptor
from overpaint.registry.sharing.ingest import PullRequest
from overpaint.registry.sharing.selection import Selection
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


LORA = "pytorch_lora_weights.safetensors"
"""The name by which diffusers' `load_lora_weights` finds it in a repository or a folder of one."""
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""The names by which PEFT, and engines that load adapters per request, find theirs."""


@dataclass(frozen=True)
class SharedAdapter:
    """Patches that other programs load together: a recipe as it is now, or one patch; `folder` is "" or ends in "/"."""

    title: str
    base: str
    patches: tuple[tuple[PatchRecord, float], ...]
    folder: str


def hub_files(
    opened: OpenRegistry,
    repository: str,
    asked: Selection,
    *,
    license: str = "",
    progress: Progress,
    warn: Callable[[str], None],
) -> Callable[[Sequence[Descriptor]], Mapping[str, bytes]]:
    """What `sending.push` asks for once it knows what the repository will list. Adapters are exported when it asks.

    What no LoRA can hold is left out, and `warn` says so.
    """

    def beside(entries: Sequence[Descriptor]) -> Mapping[str, bytes]:
        files: dict[str, bytes] = {}
        written: list[SharedAdapter] = []
        for adapter in adapters(opened, asked):
            try:
                with tempfile.TemporaryDirectory(prefix="overpaint-adapter-") as folder:
                    files |= _export(opened, adapter, Path(folder), progress)
                written.append(adapter)
            except OverpaintError as error:
                warn(f"{adapter.title} goes without a LoRA for other programs: {error}")
        files["README.md"] = card(opened, repository, entries, written, license).encode()
        return files

    return beside


def adapters(opened: OpenRegistry, asked: Selection) -> list[SharedAdapter]:
    """Every recipe that is pushed and has patches; where there is none, the newest patch of each concept and base.

    One alone is at the top of the repository, where programs look first.
    """
    registry = opened.registry
    names = registry.recipe_names() if asked.everything else asked.recipes
    made = []
    for name in names:
        record = registry.recipe(name)
        listed = tuple((registry.patch(id), strength) for id, strength in record.patches)
        made.append(SharedAdapter(name, record.base, listed, ""))
    made = [each for each in made if each.patches]
    if not made:
        records = registry.patches() if asked.everything else [registry.patch(key) for key in asked.patches]
        newest = {(record.base, record.concept): record for record in sorted(records, key=lambda each: each.solved_at)}
        made = [SharedAdapter(record.concept, base, ((record, 1.0),), "") for (base, _), record in newest.items()]
    if len(made) == 1:
        return made
    names = [re.sub(r"[^a-z0-9]+", "-", each.title.lower()).strip("-")[:60] or "patches" for each in made]
    return [
        replace(each, folder=f"lora/{number:03d}-{name}/")
        for number, (each, name) in enumerate(zip(made, names, strict=True), 1)
    ]


def _export(opened: OpenRegistry, adapter: SharedAdapter, into: Path, progress: Progress) -> dict[str, bytes]:
    """The adapter as diffusers loads it and, where one component alone is changed, as PEFT does."""
    from overpaint.patches.formats.exporting import write_adapter

    lora = into / LORA
    export_patches(
        opened,
        adapter.base,
        list(adapter.patches),
        lora,
        "diffusers",
        adapter.title,
        for_=None,
        dtype="float32",
        truncate=None,
        progress=progress,
    )
    files: dict[str, bytes] = {f"{adapter.folder}{LORA}": lora.read_bytes()}
    config = write_adapter(lora, into / WEIGHTS, hub_id(opened, adapter.base))
    if config is not None:
        files[f"{adapter.folder}{WEIGHTS}"] = (into / WEIGHTS).read_bytes()
        files[f"{adapter.folder}{CONFIG}"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    return files


def hub_id(opened: OpenRegistry, base: str) -> str:
    """The id on the Hub of a base that came from there, else nothing: no path leaves this machine."""
    from overpaint.bases.hub import HubId

    found = HubId.parse(str(opened.registry.base(base).source))
    return found.repository if found else ""


def card(
    opened: OpenRegistry, repository: str, entries: Sequence[Descriptor], written: Sequence[SharedAdapter], license: str
) -> str:
    """The card of a repository: what its layout lists, and of what is known here the solver, the sizes and what was measured."""
    from huggingface_hub import ModelCardData

    from overpaint.evaluation.report_page import rendered

    registry = opened.registry
    known = {record.id: record for record in registry.patches()}
    marks = [each.annotations for each in entries if each.artifact_type == PATCH]
    patches = [(each.get(REF, ""), each.get(NAME, "")) for each in marks]
    recipes = sorted(each.annotations.get(NAME, "") for each in entries if each.artifact_type == RECIPE)
    runs = [(name, run) for id, name in patches if id in known for run in registry.evaluations(patch=id, latest=True)]
    runs += [
        (name, run)
        for name in recipes
        if registry.has_recipe(name)
        for run in registry.evaluations(recipe=name, latest=True)
    ]
    bases = sorted({hub_id(opened, known[id].base) for id, _ in patches if id in known} - {""})
    header = ModelCardData(
        library_name="overpaint",
        base_model=bases or None,
        base_model_relation="adapter" if bases else None,
        license=license or None,
        tags=["overpaint", "concept-erasure", "unlearning", "lora", "diffusers"],
    )
    return rendered(
        "hub_card.md.j2",
        header=header.to_yaml(),
        repository=repository,
        patches=sorted((name, id, known.get(id)) for id, name in patches),
        recipes=recipes,
        adapters=written,
        runs=sorted(runs, key=lambda each: (each[0], each[1].suite)),
    )
