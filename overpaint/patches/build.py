"""Build: a custom checkpoint with a composition baked in, as a diffusers folder beside which nothing leaks.

Weight files are streamed: the header first, then every tensor in file order, patched ones from the composition and the
rest as the bytes they are. A second copy of a patched component (half-precision or EMA twins, pickles, other
frameworks) would still hold the concept; it is left out, with notice.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.digests import canonical_json, raw_bytes
from overpaint.errors import AlreadyExists, OverpaintError
from overpaint.patches.compose import Term, compose, composition_digest

CHUNK = 16 << 20
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".xml")


@dataclass(frozen=True)
class Built:
    """What was built: the folder, the digest of its weights, and the files of the base that were left out."""

    folder: Path
    digest: str
    left_out: tuple[str, ...]


def build(
    base: Base,
    terms: Iterable[Term],
    out: Path,
    *,
    card: str = "",
    record: dict[str, Any] | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> Built:
    """Write the base with `terms` baked in to the new folder `out`, whole or not at all.

    `card` becomes README.md, `record` (JSON: recipe, patch ids) goes into the header of every changed file. Raises
    AlreadyExists when `out` is there, OverpaintError when the folder cannot be written or the disk is full.
    """
    if out.exists():
        raise AlreadyExists(f"{out} is already there; name a new folder, or remove it first")
    composed = compose(base, terms)
    digest = composition_digest(base, composed)
    record = {**(record or {}), "digest": digest, "base": base.fingerprint}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise OverpaintError(
            f"cannot write to {out.parent} ({error.strerror}); choose a folder you may write to"
        ) from error
    try:
        left_out = _write_folder(base, composed, scratch, record, notice)
        (scratch / "README.md").write_text(card, "utf-8") if card else None
        _settle(scratch)
        scratch.rename(out)
        _sync_folder(out.parent)
    except OSError as error:
        raise OverpaintError(f"building {out} stopped ({error.strerror}); nothing was left behind") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Built(out, digest, tuple(left_out))


def _write_folder(
    base: Base, composed: dict[str, Tensor], scratch: Path, record: dict[str, Any], notice: Callable[[str], None]
) -> list[str]:
    by_file: dict[Path, dict[str, Tensor]] = {}
    for name, tensor in composed.items():
        place = base.places[name]
        by_file.setdefault(place.file, {})[place.key] = tensor
    in_use = {place.file for place in base.places.values()}
    changed_components = {name.partition("/")[0] for name in composed}
    left_out = []
    for source in sorted(p for p in base.path.rglob("*") if p.is_file()):
        relative = source.relative_to(base.path)
        if relative.parts[0].startswith(".") or relative.parts[0] in ("README.md", "__pycache__"):
            continue
        if _may_leak(relative, changed_components) and source not in in_use:
            left_out.append(str(relative))
            notice(f"left out {relative}: it may hold a second, unpatched copy of the weights")
            continue
        target = scratch / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if source in by_file:
            _stream(source, target, by_file[source], record)
        else:
            shutil.copyfile(source, target)
    return left_out


def _may_leak(relative: Path, changed: set[str]) -> bool:
    """Weights of a changed component, or a whole checkpoint at the top of the folder."""
    if not changed or not relative.name.endswith(_WEIGHTS):
        return False
    return len(relative.parts) == 1 or relative.parts[0] in changed


def _stream(source: Path, target: Path, replaced: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Copy a safetensors file with some tensors replaced; memory stays at one tensor."""
    with source.open("rb") as reader, target.open("wb") as writer:
        (length,) = struct.unpack("<Q", reader.read(8))
        header = json.loads(reader.read(length))
        metadata = header.pop("__metadata__", {})
        entries = {"__metadata__": {**metadata, "overpaint": canonical_json(record).decode()}, **header}
        head = json.dumps(entries, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        head += b" " * (-len(head) % 8)
        writer.write(struct.pack("<Q", len(head)) + head)
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            if key in replaced:
                data = raw_bytes(replaced[key])
                if len(data) != end - start:
                    raise OverpaintError(f"{source}: {key} has {end - start} bytes, its patched value {len(data)}")
                writer.write(data)
            else:
                _copy_range(reader, writer, 8 + length + start, end - start)


def _copy_range(reader: Any, writer: Any, offset: int, size: int) -> None:
    writer.flush()
    target = writer.tell()
    while size:
        moved = os.copy_file_range(reader.fileno(), writer.fileno(), min(size, CHUNK), offset, target)
        if not moved:
            raise OverpaintError("the base's weight file ended early; it is cut short: download the base again")
        offset, target, size = offset + moved, target + moved, size - moved
    writer.seek(target)


def _settle(folder: Path) -> None:
    """Make the folder's content durable and readable as the umask allows (mkdtemp makes it private)."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [folder, *folder.rglob("*")]:
        os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~umask)
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(path)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
