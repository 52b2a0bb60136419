"""What keeping, verifying and sharing patches costs beside reading and copying the same bytes.

A registry of patches of true size (a text map of rank 8 at text width 768, 48 KiB) is filled, verified, pushed to a folder,
pulled from it, and written to one file. Times are of one run on one disk; the ratios are what to look at.
"""

from __future__ import annotations

import array
import hashlib
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.tables import arguments, save, show
from overpaint.core.concepts import Concept
from overpaint.core.encoding import canonical_json
from overpaint.registry import Registry
from overpaint.registry.sharing.ingest import PullRequest, import_file, pull
from overpaint.registry.sharing.sending import export, push
from overpaint.registry.store import Parts, digest_of, joined, read_manifest
from overpaint.registry.upkeep import plan_collection, verify

WIDTH, RANK = 768, 8
FINGERPRINT = hashlib.sha256(b"a base").hexdigest()


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--patches", type=int, default=500, help="how many patches")
    parser.add_argument("--alike", type=int, default=10, help="how many patches share one of their two arrays")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tables = measure(Path(folder), options.patches, options.alike)
    save(options.json, *tables)


def measure(folder: Path, count: int, alike: int) -> list[dict[str, Any]]:
    """All the tables."""
    files = [make_patch_file(number, number // alike) for number in range(count)]
    ours, theirs, third = (empty(folder / name) for name in ("ours", "theirs", "third"))
    nbytes = sum(map(len, files))
    added = timed(lambda: [keep(ours, file) for file in files])
    stored = sum(blob.nbytes for blob in ours.blobs.blobs())
    read = timed(lambda: read_all(folder / "ours" / "blobs"))
    rows: list[list[Any]] = [["read and hash every blob", read, 1.0]]

    def row(what: str, action: Callable[[], object], unit: float) -> None:
        seconds = timed(action)
        rows.append([what, seconds, seconds / unit])

    row("verify", lambda: verify(ours), read)
    row("plan a collection of garbage", lambda: plan_collection(ours), read)
    copied = timed(lambda: shutil.copytree(folder / "ours" / "blobs", folder / "copy"))
    rows.append(["copy the folder of blobs", copied, 1.0])
    row("push to an empty folder", lambda: push(ours, folder / "shared"), copied)
    row("push again: nothing is missing", lambda: push(ours, folder / "shared"), copied)
    row("pull into an empty registry", lambda: pull(theirs, folder / "shared", PullRequest()), copied)
    row("pull again: everything is there", lambda: pull(theirs, folder / "shared", PullRequest()), copied)
    row("export to one file", lambda: export(ours, folder / "file"), copied)
    row("import it", lambda: import_file(third, folder / "file", PullRequest()), copied)
    assert {each.id for each in theirs.patches()} == {each.id for each in third.patches()}
    return [
        show(f"{count} patches", ["", "seconds", "ratio"], rows),
        show(
            "Sizes",
            ["", "value"],
            [
                ["patch files together, MiB", nbytes / 2**20],
                ["stored, MiB", stored / 2**20],
                ["stored / files", stored / nbytes],
                ["add a patch, ms", 1000 * added / count],
            ],
        ),
    ]


def make_patch_file(number: int, group: int) -> bytes:
    """A patch file with an array of its own and one that its group has."""
    values = {"text_encoder/down": floats(f"group {group}"), "text_encoder/up": floats(f"patch {number}")}
    arrays = {
        name: {
            "dtype": "float32",
            "shape": [WIDTH, RANK],
            "digest": digest_of([canonical_json([name, "float32", [WIDTH, RANK]]), data]),
        }
        for name, data in values.items()
    }
    content = {
        "format": 1,
        "kind": "text-map",
        "concept": Concept(f"concept {group}").as_json(),
        "solver": {"name": "separable", "settings": {}, "seed": number},
        "subject": {"fingerprint": FINGERPRINT, "tensors": FINGERPRINT, "count": 32},
        "arrays": arrays,
    }
    return joined(Parts(read_manifest(canonical_json(content)), values))


def floats(seed: str) -> bytes:
    source = random.Random(seed)
    return array.array("f", (source.random() for _ in range(WIDTH * RANK))).tobytes()


def empty(folder: Path) -> Registry:
    """A registry that knows the base."""
    registry = Registry.open(folder)
    registry.add_base("base", Path("base"), "stable-diffusion", FINGERPRINT)
    return registry


def keep(registry: Registry, file: bytes) -> None:
    from overpaint.registry.store import split

    parts = split(file)
    assert parts is not None
    content = parts.manifest.content
    registry.add_concept(Concept.from_json(content["concept"]), exist_ok=True)
    registry.add_patch(
        id=parts.manifest.id,
        blob=file,
        concept=content["concept"]["name"],
        base="base",
        solver="separable",
        kind="text-map",
        settings={},
        seed=content["solver"]["seed"],
        seconds=0.0,
    )


def read_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            hashlib.sha256(path.read_bytes()).hexdigest()


def timed(action: Callable[[], object]) -> float:
    """Seconds that an action takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
