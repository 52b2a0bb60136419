"""The file in which a vocabulary's moments are kept: believed only when its name and every digest in it are true.

A safetensors file with one array per door, float64 [sentences, d (d + 1) / 2]: the upper triangles of the symmetric
moments. Its metadata says what decided them, how far the computation is, and each array's digest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from overpaint.bases.container import BrokenFile, Container
from overpaint.bases.digests import canonical_json, tensor_digest
from overpaint.errors import OverpaintError

FORMAT, KEY = 1, "overpaint-vocabulary"


class BadVocabulary(OverpaintError):
    """A kept vocabulary that is damaged, or is not what its name says."""


@dataclass(frozen=True, eq=False)
class Heard:
    """The moments by door, float64 [sentences, d, d], after `done` pieces; `identity` is all that decides them."""

    identity: Mapping[str, Any]
    done: int
    moments: Mapping[str, Tensor]

    def fits(self, identity: Mapping[str, Any], widths: Mapping[str, int], count: int) -> bool:
        """Whether this is of that task, with so wide doors and so many sentences."""
        shapes = {door: (count, width, width) for door, width in widths.items()}
        same = canonical_json(self.identity) == canonical_json(identity)
        return same and shapes == {door: tuple(moments.shape) for door, moments in self.moments.items()}


def name_of(identity: Mapping[str, Any]) -> str:
    """What a vocabulary is called: the digest of everything that decides it."""
    return hashlib.sha256(canonical_json({"format": FORMAT, **identity})).hexdigest()


def place(identity: Mapping[str, Any], folder: Path, *, complete: bool = True) -> Path:
    """Where a vocabulary lies in a folder, whole or as far as it is."""
    return folder / f"{name_of(identity)}.{'safetensors' if complete else 'partial'}"


def keep(heard: Heard, folder: Path, *, complete: bool) -> None:
    """Write a vocabulary. A folder that cannot be written to costs time, and nothing else."""
    arrays = {door: _packed(moments) for door, moments in heard.moments.items()}
    about = {
        "format": FORMAT,
        "identity": heard.identity,
        "done": heard.done,
        "digests": {door: tensor_digest(door, array) for door, array in arrays.items()},
    }
    target = place(heard.identity, folder, complete=complete)
    scratch = target.with_suffix(f".{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(arrays, scratch, metadata={KEY: canonical_json(about).decode()})
        scratch.replace(target)
        if complete:
            place(heard.identity, folder, complete=False).unlink(missing_ok=True)
    except OSError:
        with suppress(OSError):
            scratch.unlink()


def read(file: Path) -> Heard:
    """A vocabulary that `keep` wrote, under the name that it has to have. Raises BadVocabulary."""
    try:
        container = Container.open(file)
        about = json.loads(container.metadata[KEY])
        heard = Heard(about["identity"], about["done"], {})
        digests, doors = dict(about["digests"]), set(about["identity"]["doors"])
        sound = about["format"] == FORMAT and type(heard.done) is int and heard.done >= 0
        sound = sound and name_of(heard.identity) == file.stem and doors == set(digests) == set(container.entries)
        moments = {}
        for door, array in container.tensors(container.entries) if sound else ():
            sound = sound and array.dtype == torch.float64 and array.ndim == 2
            sound = sound and tensor_digest(door, array) == digests[door] and bool(torch.isfinite(array).all())
            moments[door] = _unpacked(array) if sound else array
    except (BrokenFile, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BadVocabulary(f"{file} cannot be read as a vocabulary ({error}); delete it") from error
    if not sound:
        raise BadVocabulary(f"{file} is not the vocabulary that its name says; delete it")
    return Heard(heard.identity, heard.done, moments)


def _packed(moments: Tensor) -> Tensor:
    """The upper triangles of symmetric matrices [s, d, d] as rows: [s, d (d + 1) / 2]."""
    rows, columns = torch.triu_indices(moments.shape[-1], moments.shape[-1])
    return moments[:, rows, columns].contiguous()


def _unpacked(packed: Tensor) -> Tensor:
    """What `_packed` packed. Raises ValueError for rows that are no triangles."""
    width = int(((8 * packed.shape[-1] + 1) ** 0.5 - 1) / 2)
    rows, columns = torch.triu_indices(width, width)
    if len(rows) != packed.shape[-1]:
        raise ValueError("its rows are no triangles")
    found = torch.zeros(len(packed), width, width, dtype=packed.dtype)
    found[:, rows, columns] = packed
    found[:, columns, rows] = packed
    return found
