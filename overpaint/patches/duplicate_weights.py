"""Second copies of weights that a build is about to change: left in, they would still hold the concept.

Copies differ from what they copy (a moving average, half the precision), so a patch that was solved for one is not
right for the other: they are left out, with notice, and never patched. A copy is known by its place (another weight file
of a changed component, keys that a layout calls copies) or, where a place says nothing, by its values. What cannot be
looked into (pickles, other frameworks' files) is taken for a copy, except in the folder of a component that stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.safetensors_file import DTYPES, BrokenFile, SafetensorsFile
from overpaint.core.encoding import TensorEntry

SAMPLE = 1024
ALIKE = 0.5
"""Two tensors are copies when their first values differ by less than this part of their size. Unrelated weights differ by
1.4 of it; averages, roundings and patches by a few hundredths."""

_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5", ".onnx", ".gguf", ".npz", ".npy")
_PICTURES = {
    ".png": (b"\x89PNG",),
    ".jpg": (b"\xff\xd8\xff",),
    ".jpeg": (b"\xff\xd8\xff",),
    ".webp": (b"RIFF",),
    ".gif": (b"GIF8",),
    ".ico": (b"\0\0\1\0",),
    ".pdf": (b"%PDF",),
}
"""How such files begin: weights are easily renamed."""
_TOKENIZER_LIMIT = 16 << 20
_SECRETS = (".env", ".pem", ".key", ".p12", ".pfx", ".netrc", ".kdbx")


_LOADED = re.compile(
    r"\w*config\.json|vocab\.json|merges\.txt|tokenizer\.json|added_tokens\.json|special_tokens_map\.json|spiece\.model"
    r"|(diffusion_)?(pytorch_)?model(\.\w+)?(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index(\.\w+)?\.json)?"
)
"""The files by which the libraries load a component."""


@dataclass(frozen=True)
class Survey:
    """What a build carries over: the files `kept`, and what it leaves out, each with its reason: whole `files`, and
    `tensors` by file and key."""

    kept: tuple[Path, ...]
    files: Mapping[Path, str]
    tensors: Mapping[Path, Mapping[str, str]]

    def notices(self) -> Iterator[str]:
        """A sentence for each file, and for each reason within a file."""
        for file, reason in self.files.items():
            yield f"left out {file}: {reason}"
        for file, dropped in self.tensors.items():
            for reason in dict.fromkeys(dropped.values()):
                keys = [key for key, why in dropped.items() if why == reason]
                yield f"left out {len(keys)} tensors of {file.name}, first {keys[0]}: {reason}"


def survey(base: Base, names: Iterable[str]) -> Survey:
    """What a build that changes the named tensors may take from a base's files."""
    changed = list(names)
    if base.is_single_file:
        files: dict[Path, str] = {}
        kept = [base.path]
    else:
        # What the base's own card says is not true of the build, which gets one of its own.
        reasons = {file: _reason(base, file, changed) for file in _walk(base) if file != base.path / "README.md"}
        kept = [file for file, reason in reasons.items() if reason is None]
        files = {file: reason for file, reason in reasons.items() if reason}
    return Survey(tuple(kept), files, _tensors(base, changed) if changed else {})


def _tensors(base: Base, changed: list[str]) -> dict[Path, dict[str, str]]:
    """Tensors in the files in use that no component names, but that copy one which changes."""
    components = {name.partition("/")[0] for name in changed}
    mapped = {c: s.copies for c, s in base.form.mappings.items() if c in components} if base.form else {}
    likeness = CopyDetector(base, changed)
    copies: dict[Path, dict[str, str]] = {}
    for file, keys in base.unnamed.items():
        for key in keys:
            owner = next((c for c, patterns in mapped.items() if any(fnmatchcase(key, p) for p in patterns)), None)
            copied = None if owner else likeness.copied_by(base.containers[file], key)
            if owner or copied:
                what = f"a second copy of {owner}" if owner else f"a second copy of {copied}"
                copies.setdefault(file, {})[key] = f"{what}, which would still hold the unpatched weights"
    return copies


def _walk(base: Base, folder: Path | None = None, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Every file below a base's folder, sorted, and links to folders elsewhere; not in circles, nor into hidden places.

    Of links to folders elsewhere those of components are followed: what else is behind one could be a whole disk.
    """
    folder = folder or base.path
    above = (*above, folder.resolve())
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        inside = []
        yield folder
    for each in inside:
        if each.name.startswith(".") or each.name == "__pycache__":
            continue
        real = each.resolve() if each.is_dir() else None
        near = folder == base.path and _is_component(base, each.name)
        if real is None or not (near or real.is_relative_to(above[0]) or not each.is_symlink()):
            yield each
        elif real not in above:
            yield from _walk(base, each, above)


def _is_component(base: Base, name: str) -> bool:
    """Whether a pipeline's index names a component, whether the layout knows it or not."""
    return isinstance(base.index.get(name), list)


def _reason(base: Base, file: Path, changed: list[str]) -> str | None:
    """Why a file of a base's folder is not carried over; None when it is."""
    relative = file.relative_to(base.path)
    if file in base.containers:
        return None
    if not file.is_file() and not file.is_dir():
        return "it is no plain file"
    if file.name.lower().endswith(_SECRETS):
        return "it is no part of a pipeline, and may hold a secret"
    if file.is_dir() or not (_is_inside(base, file) or _is_named_by_convention(base, relative)):
        return "it is a link out of the base's folder, or cannot be read"
    if not changed:
        return None
    components = {name.partition("/")[0] for name in changed}
    inside = relative.parts[0] if len(relative.parts) > 1 else ""
    if file.name.endswith(".json") and ".index" in file.name and inside in components:
        return None if _names_used_files(base, file) else "it lists weight files that are left out"
    if _is_plain(file):
        return None
    if inside in components:
        return f"a second copy of {inside}, which would still hold the unpatched weights"
    if file.suffix == ".safetensors":
        copied = _copied_in(base, file, changed)
        return None if copied is None else f"it may hold a second copy of {copied}"
    if _is_component(base, inside):
        return None
    return "it cannot be looked into, and may hold a second copy of the weights"


def _is_inside(base: Base, file: Path) -> bool:
    """Whether a file's content is in the base's folder, in that of a component, or in the Hub's cache."""
    real = file.resolve()
    folders = [base.path.resolve(), file.parent.resolve()]
    if base.path.parent.name == "snapshots":  # there every file is a link to a blob
        folders.append((base.path.parent.parent / "blobs").resolve())
    return any(real.is_relative_to(folder) for folder in folders)


def _is_named_by_convention(base: Base, relative: Path) -> bool:
    """Whether diffusers or transformers would look for a file of that name there, so that a link to it is meant."""
    if len(relative.parts) == 1:
        return relative.name == "model_index.json"
    return (
        len(relative.parts) == 2 and _is_component(base, relative.parts[0]) and bool(_LOADED.fullmatch(relative.name))
    )


def _is_plain(file: Path) -> bool:
    """Whether a file is a text or a picture."""
    if file.name.endswith(_WEIGHTS):
        return False
    try:
        with file.open("rb") as opened:
            beginning = opened.read(4096)
    except OSError:
        return False
    if file.suffix in _PICTURES:
        return beginning.startswith(_PICTURES[file.suffix])
    # SentencePiece's models are binary, and lie beside the other files of a tokenizer.
    if file.suffix == ".model":
        return file.parent.name.startswith("tokenizer") and file.stat().st_size <= _TOKENIZER_LIMIT
    return b"\0" not in beginning


def _names_used_files(base: Base, index: Path) -> bool:
    try:
        shards = json.loads(index.read_text("utf-8"))["weight_map"].values()
        return all(index.parent / shard in base.containers for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _copied_in(base: Base, file: Path, changed: list[str]) -> str | None:
    """The changed tensor that a strange weight file copies; the file itself when it cannot be read."""
    try:
        container = SafetensorsFile.open(file)
    except BrokenFile:
        return "the weights (it is damaged)"
    likeness = CopyDetector(base, changed)
    return next((name for key in container.entries if (name := likeness.copied_by(container, key))), None)


class CopyDetector:
    """Decides whether a tensor is nearly one of some tensors of a base, from the first values of both.

    Vectors are not compared: norms and biases are too alike to recognise a copy.
    """

    def __init__(self, base: Base, names: Iterable[str]) -> None:
        self._by_count: dict[int, list[tuple[str, Tensor]]] = {}
        for name in names:
            place = base.places[name]
            container = base.containers[place.file]
            if len(place.shape) > 1 and DTYPES[place.entry.dtype].is_floating_point:
                sample = container.beginning(place.entry, SAMPLE).double()
                self._by_count.setdefault(_count(place.entry), []).append((name, sample))

    def copied_by(self, container: SafetensorsFile, key: str) -> str | None:
        """The name of the tensor that another file's tensor copies."""
        entry = container.entries[key]
        known = self._by_count.get(_count(entry), [])
        if not known or len(entry.shape) < 2 or not DTYPES[entry.dtype].is_floating_point:
            return None
        values = container.beginning(entry, SAMPLE).double()
        for name, sample in known:
            if torch.linalg.vector_norm(values - sample) < ALIKE * torch.linalg.vector_norm(sample):
                return name
        return None


def _count(entry: TensorEntry) -> int:
    return entry.size // DTYPES[entry.dtype].itemsize
