"""Bases on the Hugging Face Hub: an id and a revision, resolved to one commit, as a folder in the Hub's own cache.

Only what a base needs is downloaded: configurations, tokenizers, and of each component's weights the plain ones, or one
variant where there are no plain ones. What is in the cache stays usable without a network, and with `HF_HUB_OFFLINE` set
nothing else is tried.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overpaint.bases.checkpoint import BrokenBase, open_folder, shared_variant, weight_variants
from overpaint.bases.layout import Layout, layout_of
from overpaint.core.errors import NotFound, OverpaintError

_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
LONGEST_ID = 96
"""Characters that the Hub lets an id have."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SMALL = (".json", ".txt", ".md", ".model")


@dataclass(frozen=True)
class HubId:
    """A model on the Hub: `ORG/MODEL`, and a branch, tag or commit."""

    repository: str
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """`ORG/MODEL` or `ORG/MODEL@REVISION`; None when a text is neither."""
        match = _ID.fullmatch(text)
        if match is None or ".." in text or "--" in match["repository"] or len(match["repository"]) > LONGEST_ID:
            return None
        return cls(match["repository"], match["revision"] or "main")

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}"


def snapshot(wanted: HubId) -> tuple[Path, HubId]:
    """The folder of a model in the Hub's cache, downloaded where it is not there, and its id with the commit it is of.

    Raises NotFound for a model or revision the Hub does not have, and when there is neither a network nor a copy;
    UnknownLayout or BrokenBase, before any weights are downloaded, when it is no base.
    """
    if _COMMIT.fullmatch(wanted.revision):
        snapshot = cached(wanted)
        if snapshot is not None and _is_whole(snapshot):
            return snapshot, wanted
    try:
        commit, listing = _resolved(wanted)
    except _Unreachable as error:
        snapshot = cached(wanted)
        if snapshot is None:
            raise NotFound(
                f"{wanted} is no folder here, and is not in the Hub's cache; the Hub cannot be asked ({error}): go online once"
            ) from error
        return snapshot, HubId(wanted.repository, snapshot.name)
    return _download(HubId(wanted.repository, commit), listing), HubId(wanted.repository, commit)


class _Unreachable(Exception):
    """The Hub gives no answer, or must not be asked."""


def _resolved(wanted: HubId) -> tuple[str, list[str]]:
    """The commit of a revision, and the files it has."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info: Any = huggingface_hub.model_info(wanted.repository, revision=wanted.revision)
    except GatedRepoError as error:
        raise OverpaintError(
            f"{wanted.repository} asks for your consent first: accept its terms on the Hub, then log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise NotFound(
            f"{wanted} is neither a folder here nor a model and revision on the Hub; mend the name, or log in with "
            "`hf auth login` if it is private"
        ) from error
    # No network, an outage, offline mode: each library beneath has its own names for these.
    except Exception as error:
        raise _Unreachable(str(error).strip().partition("\n")[0][:120] or type(error).__name__) from error
    return str(info.sha), [str(sibling.rfilename) for sibling in info.siblings or ()]


def _download(wanted: HubId, listing: list[str]) -> Path:
    import huggingface_hub

    if "model_index.json" not in listing:
        raise BrokenBase(
            f"{wanted.repository} has no model_index.json, so it is no pipeline; name one in diffusers format"
        )
    try:
        index = huggingface_hub.hf_hub_download(wanted.repository, "model_index.json", revision=wanted.revision)
        needed = list(_needed(layout_of(Path(index).parent), listing, wanted))
        return Path(
            huggingface_hub.snapshot_download(wanted.repository, revision=wanted.revision, allow_patterns=needed)
        )
    except OverpaintError:
        raise
    except Exception as error:
        why = str(error).strip().partition("\n")[0][:120]
        raise OverpaintError(f"{wanted} could not be downloaded ({why}); try again, what has come stays") from error


def _needed(layout: Layout, listing: Sequence[str], wanted: HubId) -> Iterator[str]:
    """The files of a model that its base is read from, and those it is loaded with."""
    yield from (name for name in listing if name.endswith(_SMALL))
    files = {
        name: [each.removeprefix(f"{name}/") for each in listing if each.startswith(f"{name}/")]
        for name in layout.components
    }
    offered = {name: weight_variants(files[name], each.weights) for name, each in layout.components.items()}
    shared = shared_variant(offered.values())
    for name, component in layout.components.items():
        inside, variants = files[name], offered[name]
        if not variants and component.optional:
            continue
        if not variants:
            raise BrokenBase(
                f"{wanted.repository} has no {name}/{component.weights}.safetensors; choose a revision or a copy that has"
            )
        stem = component.weights + (shared if shared in variants else variants[0])
        whole = f"{stem}.safetensors"
        shards = [file for file in inside if file.startswith(f"{stem}-") and file.endswith(".safetensors")]
        yield from (f"{name}/{file}" for file in ([whole] if whole in inside else shards))


def cached(wanted: HubId) -> Path | None:
    """The folder of a model in the Hub's cache as far as it is there, None when it is not; nothing is downloaded."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(wanted.repository, revision=wanted.revision, local_files_only=True)
        )
    except LocalEntryNotFoundError as error:
        # Newer versions report this of a folder that has not every file of the repository; ours never has.
        part = getattr(error, "snapshot_path", None)
        return Path(part) if part else None


def _is_whole(folder: Path) -> bool:
    try:
        open_folder(folder)
    except OverpaintError:
        return False
    return True
