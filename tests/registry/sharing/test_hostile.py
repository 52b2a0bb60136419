"""Whatever a stranger sends is taken whole or refused with a sentence, and what is refused leaves nothing behind."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overpaint.core.concepts import Concept
from overpaint.core.encoding import canonical_json
from overpaint.core.errors import OverpaintError
from overpaint.registry import Registry
from overpaint.registry.sharing.documents import (
    INDEX,
    MANIFEST,
    NAME,
    PATCH,
    RECIPE,
    Descriptor,
    patch_document,
    recipe_document,
    record_document,
    record_of,
)
from overpaint.registry.sharing.ingest import PullRequest, import_file, pull
from overpaint.registry.sharing.layout import OciLayout
from overpaint.registry.sharing.sending import export, push
from overpaint.registry.store import Parts, joined, open_files, read_manifest
from overpaint.registry.upkeep import verify
from tests.registry.patch_maker import numbers

from .conftest import FINGERPRINT, is_empty, labelled

ALL = PullRequest()


def refused(registry: Registry, take: Callable[[], object], message: str) -> None:
    with pytest.raises(OverpaintError, match=message) as caught:
        take()
    assert len(str(caught.value)) < 1500
    assert str(caught.value).isprintable()
    assert is_empty(registry)
    assert verify(registry).problems == ()


# Files


def tar_of(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.USTAR_FORMAT, mode: str = "w:") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=format) as archive:  # type: ignore[call-overload]
        for member, data in members:
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, target
    return found


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("index.json", b"\0" * (64 << 20))
    return buffer.getvalue()


def claiming(size: int) -> bytes:
    """An archive whose first file claims to be of this size."""
    entry = member("index.json")
    entry.size = size
    return entry.tobuf(tarfile.GNU_FORMAT) + bytes(4096)


class Malicious:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.made), "w")


LAYOUT = (member("oci-layout"), b'{"imageLayoutVersion":"1.0.0"}')

FILES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "path traversal": (lambda _: tar_of(LAYOUT, (member("../../evil"), b"x")), "no place in an archive"),
    "absolute path": (lambda _: tar_of(LAYOUT, (member("/tmp/evil"), b"x")), "no place in an archive"),
    "traversal in a blob's name": (lambda _: tar_of(LAYOUT, (member("blobs/sha256/../x"), b"x")), "no place in"),
    "symbolic link": (lambda _: tar_of((member("index.json", tarfile.SYMTYPE, "/etc/passwd"), b"")), "no place in"),
    "hard link": (lambda _: tar_of((member("index.json", tarfile.LNKTYPE, "/etc/passwd"), b"")), "no place in"),
    "device": (lambda _: tar_of((member("index.json", tarfile.CHRTYPE), b"")), "no place in"),
    "folder": (lambda _: tar_of((member("blobs", tarfile.DIRTYPE), b"")), "no place in"),
    "sparse file": (lambda _: tar_of((member("index.json", tarfile.GNUTYPE_SPARSE), b"")), "no place in"),
    "long names by GNU": (lambda _: tar_of((member("x" * 1_000_000), b""), format=tarfile.GNU_FORMAT), "no place in"),
    "extended header": (lambda _: tar_of((member("ü" * 200), b""), format=tarfile.PAX_FORMAT), "no place in"),
    "name that is not UTF-8": (
        lambda _: member("\xff\xfe").tobuf(tarfile.USTAR_FORMAT, "latin-1", "strict") + bytes(1024),
        "is damaged",
    ),
    "name twice": (lambda _: tar_of(LAYOUT, LAYOUT), "twice"),
    "size of a terabyte": (lambda _: claiming(1 << 40), "ends in the middle"),
    "negative size": (lambda _: claiming(-512), "no place in|is damaged"),
    "nothing but an end": (lambda _: tar_of(), "neither an archive"),
    "no list": (lambda _: tar_of(LAYOUT), "cut short or goes on|has no index.json"),
    "compressed archive": (lambda _: tar_of(LAYOUT, mode="w:gz"), "neither an archive"),
    "zip bomb": (lambda _: zip_bomb(), "neither an archive"),
    "pickle": (lambda made: pickle.dumps(Malicious(made)), "neither an archive"),
    "pickle dressed as safetensors": (
        lambda made: struct.pack("<Q", 2) + b"{}" + pickle.dumps(Malicious(made)),
        "not the sound file of a patch",
    ),
    "pickle in a header": (
        lambda made: struct.pack("<Q", len(pickle.dumps(Malicious(made)))) + pickle.dumps(Malicious(made)),
        "neither an archive",
    ),
    "header bomb": (lambda _: struct.pack("<Q", 1 << 62) + b"{" + b" " * 1000, "neither an archive"),
    "header of a hundred megabytes": (lambda _: struct.pack("<Q", 100 << 20) + b"{" + b" " * (100 << 20), "neither an"),
    "header that nests": (lambda _: struct.pack("<Q", 1 << 20) + b'{"a":' * (1 << 18), "not the sound file"),
    "header that is not UTF-8": (lambda _: struct.pack("<Q", 8) + b'{"\xff\xfe":1}', "not the sound file"),
    "half a patch": (lambda _: labelled("one")[:-7], "not the sound file"),
    "flipped bit": (lambda _: labelled("one")[:-1] + b"\x7f", "not the sound file"),
    "bytes after the end": (lambda _: labelled("one") + b"more", "not the sound file"),
    "empty": (lambda _: b"", "neither an archive"),
    "text": (lambda _: b"hello\n" * 200, "neither an archive"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused(theirs: Registry, tmp_path: Path, name: str) -> None:
    make, message = FILES[name]
    file, made = tmp_path / "file", tmp_path / "made-by-a-pickle"
    file.write_bytes(make(made))
    before = sorted(tmp_path.iterdir())
    refused(theirs, lambda: import_file(theirs, file, ALL), message)
    assert sorted(tmp_path.iterdir()) == before, "nothing was unpacked, and nothing ran"


def test_a_sparse_file_of_a_terabyte_is_refused_at_once(theirs: Registry, tmp_path: Path) -> None:
    for beginning in (claiming(1 << 39)[:512], struct.pack("<Q", 1000) + b"{"):
        with (tmp_path / "file").open("wb") as file:
            file.write(beginning)
            file.truncate(1 << 40)
        refused(theirs, lambda: import_file(theirs, tmp_path / "file", ALL), "goes on after|damaged|at most|no place")


# Manifests that say what no patch says


def sent(registry_folder: Path, manifest: dict[str, Any], values: dict[str, bytes]) -> Path:
    """A pushed folder with one patch of this manifest, every digest as it should be."""
    layout = OciLayout(open_files(registry_folder))
    layout.begin()
    read = read_manifest(canonical_json(manifest))
    document = patch_document(read)
    layout.put(read.id, len(read.raw), [read.raw])
    for array in read.arrays:
        layout.put(array.digest, len(array.label) + len(values[array.name]), [array.label, values[array.name]])
    layout.put_document(document)
    layout.update(lambda before: [document.descriptor])
    return registry_folder


def plain(**changes: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A manifest with changes, and the values it lists."""
    shape, values = numbers("x", 2, 2)
    digest = hashlib.sha256(canonical_json(["a", "float32", list(shape)]) + values).hexdigest()
    manifest = {
        "format": 1,
        "kind": "dense",
        "concept": Concept("apple").as_json(),
        "solver": {"name": "uce", "settings": {}, "seed": 1},
        "subject": {"fingerprint": FINGERPRINT, "tensors": "0" * 64, "count": 1},
        "arrays": {"a": {"dtype": "float32", "shape": list(shape), "digest": digest}},
    }
    return {**manifest, **changes}, {"a": values}


def concept(**changes: Any) -> dict[str, Any]:
    return {"concept": {**Concept("apple").as_json(), **changes}}


MANIFESTS: dict[str, tuple[dict[str, Any], str]] = {
    "name of a megabyte": (concept(name="x" * (1 << 20)), "at most 400 characters"),
    "synonym of a megabyte": (concept(synonyms=["x" * (1 << 20)]), "at most 400 characters"),
    "name that clears the screen": (concept(name="\x1b[2J"), "does not print"),
    "name with a zero": (concept(name="a\0b"), "does not print"),
    "name with a line break": (concept(name="a\nb"), "does not print"),
    "empty name": (concept(name=""), "lacks its kind, its concept"),
    "blank name": (concept(name="  "), "needs a name"),
    "name that is a number": (concept(name=7), "lacks its kind, its concept"),
    "name that is a list": (concept(name=["apple"]), "lacks its kind, its concept"),
    "synonyms that are a word": (concept(synonyms="abc"), "not made of words"),
    "synonyms that are numbers": (concept(synonyms=[1]), "not made of words"),
    "anchor that is an object": (concept(anchor={}), "not made of words"),
    "kind of concept that is unknown": (concept(kind="spell"), "unknown kind of concept"),
    "concept with more fields": (concept(danger=1), "no patch's"),
    "no concept": ({"concept": None}, "lacks its kind, its concept"),
    "no solver": ({"solver": []}, "lacks its kind, its concept"),
    "solver of a megabyte": ({"solver": {"name": "x" * (1 << 20)}}, "at most 400"),
    "settings that are a list": ({"solver": {"name": "x", "settings": []}}, "settings or seed"),
    "seed beyond the database": ({"solver": {"name": "x", "seed": 1 << 64}}, "settings or seed"),
    "seed that is text": ({"solver": {"name": "x", "seed": "1; DROP TABLE patch"}}, "settings or seed"),
    "no base": ({"subject": {}}, "lacks its kind, its concept"),
    "base of somebody else": ({"subject": {"fingerprint": "d" * 64}}, "does not have"),
    "base that is SQL": ({"subject": {"fingerprint": "' OR 1=1 --"}}, "does not have"),
    "kind that is no text": ({"kind": 1}, "lacks its kind"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_no_row_could_hold_is_refused(theirs: Registry, tmp_path: Path, name: str) -> None:
    changes, message = MANIFESTS[name]
    manifest, values = plain(**changes)
    if isinstance(manifest["subject"], dict) and "fingerprint" in manifest["subject"]:
        folder = sent(tmp_path / "shared", manifest, values)
        refused(theirs, lambda: pull(theirs, folder, ALL), message)
    file = tmp_path / "bare"
    file.write_bytes(joined(Parts(read_manifest(canonical_json(manifest)), values)))
    refused(theirs, lambda: import_file(theirs, file, ALL), message)


@pytest.mark.parametrize("name", ["Robert'); DROP TABLE patch;--", "../../etc/passwd", "草間彌生", "%_*?[a]"])
def test_odd_names_are_only_names(theirs: Registry, tmp_path: Path, name: str) -> None:
    manifest, values = plain(**concept(name=name))
    pull(theirs, sent(tmp_path / "shared", manifest, values), ALL)
    assert theirs.patch(name).concept == name
    assert verify(theirs).problems == ()
    export(theirs, tmp_path / "file", patches=[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "shared", "theirs"]


# Layouts that lie


def blob_path(folder: Path, digest: str) -> Path:
    return folder / "blobs" / "sha256" / digest.removeprefix("sha256:")


def overwrite(path: Path, data: bytes) -> None:
    if path.exists():
        path.chmod(0o644)
    path.write_bytes(data)


def first_patch(folder: Path) -> Descriptor:
    return next(each for each in OciLayout(open_files(folder)).entries() if each.artifact_type == PATCH)


def relist(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite index.json by hand."""
    content = json.loads((folder / "index.json").read_bytes())
    change(content)
    overwrite(folder / "index.json", json.dumps(content).encode())


def redocument(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the first patch's document, and list the new one with a digest and size that fit."""
    entry = first_patch(folder)
    content = json.loads(blob_path(folder, entry.digest).read_bytes())
    change(content)
    data = canonical_json(content)
    new = Descriptor.of(data, MANIFEST, PATCH, annotations=entry.annotations)
    blob_path(folder, new.digest).write_bytes(data)
    layout = OciLayout(open_files(folder))
    layout.update(lambda before: [new])


def other_config(content: dict[str, Any]) -> None:
    content["config"]["digest"] = content["layers"][0]["digest"]
    content["config"]["size"] = content["layers"][0]["size"]


LIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "list that is no JSON": (lambda f: overwrite(f / "index.json", b"{"), "not JSON"),
    "list that is not UTF-8": (lambda f: overwrite(f / "index.json", b"\xff\xfe{}"), "not UTF-8"),
    "list that nests": (lambda f: overwrite(f / "index.json", b"[" * 100_000), "not JSON"),
    "list without manifests": (lambda f: overwrite(f / "index.json", b'{"schemaVersion":2}'), "lists no manifests"),
    "list of another version": (lambda f: relist(f, lambda c: c.update(schemaVersion=1)), "schemaVersion 2"),
    "list of numbers": (lambda f: relist(f, lambda c: c.update(manifests=[1])), "no descriptor"),
    "layout of another version": (lambda f: overwrite(f / "oci-layout", b'{"imageLayoutVersion":"9"}'), "1.0.0"),
    "mark of a gigabyte": (lambda f: os.truncate(f / "oci-layout", 1 << 30), "no OCI image layout"),
    "list of a gigabyte": (lambda f: os.truncate(f / "index.json", 1 << 30), "at most"),
    "digest that is a path": (
        lambda f: relist(f, lambda c: c["manifests"][0].update(digest="sha256:../../../../etc/passwd")),
        "not sha256: and 64",
    ),
    "digest of another algorithm": (
        lambda f: relist(f, lambda c: c["manifests"][0].update(digest="md5:" + "0" * 32)),
        "not sha256: and 64",
    ),
    "digest of a megabyte": (
        lambda f: relist(f, lambda c: c["manifests"][0].update(digest="sha256:" + "0" * (1 << 20))),
        "not sha256: and 64",
    ),
    "size that is text": (lambda f: relist(f, lambda c: c["manifests"][0].update(size="1")), "no number of bytes"),
    "size that is negative": (lambda f: relist(f, lambda c: c["manifests"][0].update(size=-1)), "no number of bytes"),
    "size that lies": (
        lambda f: relist(f, lambda c: c["manifests"][0].update(size=7)),
        "at most 7|not what its digest",
    ),
    "size of an exabyte": (lambda f: relist(f, lambda c: c["manifests"][0].update(size=1 << 60)), "no document"),
    "annotations that are a list": (
        lambda f: relist(f, lambda c: c["manifests"][0].update(annotations=[1])),
        "describes",
    ),
    "document that is another file": (
        lambda f: overwrite(blob_path(f, first_patch(f).digest), b"{}"),
        "not what its digest says",
    ),
    "document that is missing": (lambda f: blob_path(f, first_patch(f).digest).unlink(), "lacks the blob"),
    "document that is a link": (
        lambda f: _link(blob_path(f, first_patch(f).digest), Path("/etc/passwd")),
        "symbolic link",
    ),
    "document that is a pipe": (lambda f: _pipe(blob_path(f, first_patch(f).digest)), "not a plain file"),
    "document with another config": (lambda f: redocument(f, other_config), "not JSON|not UTF-8"),
    "document with another subject": (
        lambda f: redocument(f, lambda c: c["subject"].update(digest="sha256:" + "0" * 64)),
        "is not that of patch",
    ),
    "document with one layer less": (lambda f: redocument(f, lambda c: c["layers"].pop()), "is not that of patch"),
    "document with a note": (lambda f: redocument(f, lambda c: c["annotations"].update(x="y")), "is not that of patch"),
    "document with a huge config": (
        lambda f: redocument(f, lambda c: c["config"].update(size=1 << 40)),
        "at most 8388608 belong there",
    ),
    "document without a config": (lambda f: redocument(f, lambda c: c.pop("config")), "no descriptor"),
    "array with a flipped bit": (lambda f: _flip(f, 0), "not what its digest says"),
    "array that is longer": (lambda f: _grow(f), "at most|not what its digest says"),
    "array that is missing": (lambda f: _array(f).unlink(), "lacks the blob"),
    "list that names a file elsewhere by folder link": (lambda f: _link_folder(f), "lacks the blob"),
}


def _array(folder: Path) -> Path:
    document = json.loads(blob_path(folder, first_patch(folder).digest).read_bytes())
    return blob_path(folder, document["layers"][0]["digest"])


def _flip(folder: Path, bit: int) -> None:
    data = bytearray(_array(folder).read_bytes())
    data[-1] ^= 1 << bit
    overwrite(_array(folder), bytes(data))


def _grow(folder: Path) -> None:
    overwrite(_array(folder), _array(folder).read_bytes() + b"x")


def _link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link_folder(folder: Path) -> None:
    (folder / "blobs" / "sha256").rename(folder / "moved")
    (folder / "blobs" / "sha256").symlink_to("/etc")


@pytest.mark.parametrize("name", LIES)
def test_a_layout_that_lies_is_refused(ours: Registry, theirs: Registry, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "shared"
    push(ours, folder, patches=[record.id for record in ours.patches()])
    spoil, message = LIES[name]
    spoil(folder)
    refused(theirs, lambda: pull(theirs, folder, ALL), message)


def test_a_manifest_whose_digest_lies_is_refused(ours: Registry, theirs: Registry, tmp_path: Path) -> None:
    """The list, the document and every size agree with a manifest that somebody changed after the fact."""
    push(ours, tmp_path / "shared")
    document = json.loads(blob_path(tmp_path / "shared", first_patch(tmp_path / "shared").digest).read_bytes())
    path = blob_path(tmp_path / "shared", document["config"]["digest"])
    overwrite(path, path.read_bytes().replace(b'"strength"', b'"strengtH"').replace(b"apple", b"appel"))
    refused(theirs, lambda: pull(theirs, tmp_path / "shared", ALL), "not what its digest says")


# Recipes that lie


def with_record(ours: Registry, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Push, then replace the recipe by one of a changed record, every digest as it should be."""
    push(ours, folder)
    layout = OciLayout(open_files(folder))
    honest = record_of(ours, "safe")
    content = json.loads(honest.raw)
    change(content)
    raw = canonical_json(content)
    fingerprint = content.get("base", {}).get("fingerprint") if isinstance(content.get("base"), dict) else ""
    record = record_document(raw, str(fingerprint))
    patches = []
    for each in layout.entries():
        if each.artifact_type == PATCH:
            config = json.loads(layout.document(each))["config"]
            if config["digest"][7:] in honest.patches:
                patches.append(patch_document(read_manifest(layout.blob(config["digest"][7:], config["size"]))))
    recipe = recipe_document(record, patches)
    layout.put(record_descriptor(raw).digest, len(raw), [raw])
    layout.put_document(record)
    layout.put_document(recipe)
    marked = Descriptor(INDEX, recipe.descriptor.digest, recipe.descriptor.size, RECIPE, {NAME: "safe"})
    layout.update(lambda before: [*(each for each in before if each.artifact_type != RECIPE), marked])
    return folder


def record_descriptor(raw: bytes) -> Descriptor:
    return Descriptor.of(raw, "")


def _rewrite(index: int, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["revisions"][index].update(changes)


def _change(index: int, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["revisions"][index]["changes"][0].update(changes)


RECORDS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "name of a megabyte": (lambda c: c.update(name="x" * (1 << 20)), "at most 400"),
    "name that clears the screen": (lambda c: c.update(name="\x1b[2J"), "does not print"),
    "name that is a list": (lambda c: c.update(name=[]), "the name of a recipe is a text|needs a name"),
    "no base": (lambda c: c.pop("base"), "cannot be read"),
    "another base": (lambda c: c["base"].update(fingerprint="d" * 64), "solved for another base|does not have"),
    "a later format": (lambda c: c.update(format=2), "newer than this program"),
    "a missing revision": (lambda c: c["revisions"].pop(0), "is missing"),
    "an unknown action": (_rewrite(0, action="explode"), "does what no revision does"),
    "a reason of a megabyte": (_rewrite(0, why="x" * (1 << 20)), "at most 10000"),
    "a doer that rings": (_rewrite(0, who="\a"), "does not print"),
    "a time that is none": (_rewrite(0, at="Tuesday"), "cannot be read"),
    "a time without a zone": (_rewrite(0, at="2026-01-01T00:00:00"), "moment in UTC"),
    "a strength that is text": (_change(0, strength_after="1"), "finite number"),
    "a strength that is true": (_change(0, strength_after=True), "finite number"),
    "a strength of before": (_change(2, strength_before=9.0), "does not continue"),
    "a patch that is a path": (_change(0, patch="../../x"), "does not continue"),
    "a patch that did not come": (_change(0, patch="0" * 64), "does not continue|did not come with it"),
    "a day that is none": (_change(0, until_after="never"), "cannot be read"),
    "a patch twice": (
        lambda c: c["revisions"][0]["changes"].append(c["revisions"][0]["changes"][0]),
        "one patch twice",
    ),
    "a tag on no revision": (
        lambda c: c["tags"].append({"tag": "x", "revision": 99, "who": "me", "at": "2026-01-01T00:00:00+00:00"}),
        "cannot be",
    ),
    "a tag that is a number": (
        lambda c: c["tags"].append({"tag": "7", "revision": 1, "who": "me", "at": "2026-01-01T00:00:00+00:00"}),
        "number",
    ),
    "revisions that are text": (lambda c: c.update(revisions="abc"), "cannot be read"),
    "changes that are missing": (lambda c: c["revisions"][0].pop("changes"), "cannot be read"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_recipe_that_lies_is_refused(ours: Registry, theirs: Registry, tmp_path: Path, name: str) -> None:
    change, message = RECORDS[name]
    folder = with_record(ours, tmp_path / "shared", change)
    refused(theirs, lambda: pull(theirs, folder, ALL), message)


def test_the_records_that_are_refused_are_so_for_their_lies(ours: Registry, theirs: Registry, tmp_path: Path) -> None:
    pull(theirs, with_record(ours, tmp_path / "shared", lambda content: None), ALL)
    assert theirs.log("safe") == ours.log("safe")
