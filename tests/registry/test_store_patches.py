"""A patch file is kept as its manifest and its arrays, each array once, and comes back byte for byte."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from uuid import uuid4

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overpaint.bases.base import Base
from overpaint.bases.safetensors_file import tensor_digest
from overpaint.core.concepts import Concept
from overpaint.core.encoding import canonical_json
from overpaint.core.encoding import canonical_json as canonical_json_of_bases
from overpaint.patches.delta import Dense, TextMap
from overpaint.patches.patch import make_patch, read_patch
from overpaint.registry import Registry
from overpaint.registry.store import (
    BadManifest,
    BlobCorrupt,
    BlobMissing,
    BlobStore,
    PatchFiles,
    embedded_manifest,
    open_files,
    read_manifest,
    split,
)

from .contents import add_patch
from .patch_maker import id_of, keep, numbers, patch_file


@pytest.fixture
def files() -> PatchFiles:
    return PatchFiles(BlobStore(open_files(f"memory://{uuid4()}")))


def digest(file: bytes) -> str:
    return hashlib.sha256(file).hexdigest()


def test_a_patch_file_comes_back_byte_for_byte(files: PatchFiles) -> None:
    file = patch_file("one")
    files.put(id_of(file), file)
    assert files.get(id_of(file), digest(file)) == file
    assert files.holds(id_of(file), digest(file))
    assert digest(file) not in list(files.blobs.digests())


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=9).filter("__metadata__".__ne__),
        st.lists(st.integers(0, 4), max_size=3),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=40, deadline=None)
def test_any_names_and_shapes_come_back(shapes: dict[str, list[int]]) -> None:
    files = PatchFiles(BlobStore(open_files(f"memory://{uuid4()}")))
    file = patch_file("any", {name: numbers(name, *shape) for name, shape in shapes.items()})
    files.put(id_of(file), file)
    assert files.get(id_of(file), digest(file)) == file
    assert not files.blobs.exists(digest(file))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_solved_patch_is_stored_in_parts_and_reads_back(base: Base, files: PatchFiles, dtype: torch.dtype) -> None:
    name = base.projections()[0]
    for delta in (
        TextMap("text_encoder", torch.randn(64, 2).to(dtype), torch.randn(64, 2).to(dtype)),
        Dense({name: torch.randn(base.tensor(name).shape).to(dtype)}),
    ):
        patch = make_patch(base, Concept("Käse 'quoted'"), delta, {"name": "test", "settings": {"rate": 1e-7}})
        files.put(patch.id, patch.blob)
        assert not files.blobs.exists(digest(patch.blob))
        assert read_patch(files.get(patch.id, digest(patch.blob))).id == patch.id


def test_an_arrays_blob_has_the_digest_that_the_manifest_gives_the_array(files: PatchFiles) -> None:
    file = patch_file("one")
    files.put(id_of(file), file)
    shape, values = numbers("one/up", 16, 2)
    tensor = torch.frombuffer(bytearray(values), dtype=torch.float32).reshape(shape)
    assert files.blobs.exists(tensor_digest("text_encoder/up", tensor))


def test_an_array_in_ten_patches_is_stored_once(files: PatchFiles) -> None:
    shared, size = numbers("shared", 64, 64), 64 * 64 * 4
    for number in range(10):
        arrays = {"unet/shared": shared, "unet/own": numbers(number, 4)}
        file = patch_file(f"patch {number}", arrays)
        files.put(id_of(file), file)
        assert files.get(id_of(file), digest(file)) == file
    blobs = list(files.blobs.blobs())
    assert len(blobs) == 10 + 10 + 1
    assert sum(blob.nbytes >= size for blob in blobs) == 1


def test_a_blob_that_is_no_patch_file_is_stored_whole(files: PatchFiles) -> None:
    file = patch_file("one")
    flipped = file[:-1] + bytes([file[-1] ^ 1])
    longer = file + b"\0"
    for data in (b"", b"text", b"\xff" * 64, flipped, longer, file[:100]):
        assert split(data) is None
        files.put("0" * 64, data)
        assert files.get("0" * 64, digest(data)) == data
        assert files.holds("0" * 64, digest(data))
        assert files.blobs.exists(digest(data))


def test_a_file_under_another_id_is_stored_whole(files: PatchFiles) -> None:
    file = patch_file("one")
    files.put("0" * 64, file)
    assert files.blobs.exists(digest(file))
    assert files.get("0" * 64, digest(file)) == file


def test_a_registry_with_whole_files_keeps_working_and_keeps_them(registry: Registry) -> None:
    file = patch_file("one")
    registry.blobs.put(file)
    record = keep(registry, file)
    assert registry.blob(record) == file
    assert list(registry.blobs.digests()) == [digest(file)]


def test_a_registry_stores_solved_patches_in_parts(registry: Registry) -> None:
    record = keep(registry, patch_file("one"))
    assert registry.blobs.exists(record.id)
    assert not registry.blobs.exists(record.blob)
    assert registry.blob(record) == patch_file("one")
    assert record.nbytes == len(patch_file("one"))


def test_a_missing_or_damaged_part_is_named(files: PatchFiles) -> None:
    file = patch_file("one")
    files.put(id_of(file), file)
    array = files.manifest(id_of(file)).arrays[0]
    files.blobs.discard(array.digest)
    assert not files.holds(id_of(file), digest(file))
    with pytest.raises(BlobMissing, match=array.digest):
        files.get(id_of(file), digest(file))
    files.put(id_of(file), file)
    files.blobs.discard(id_of(file))
    assert not files.holds(id_of(file), digest(file))


def test_a_blob_that_is_another_array_is_refused(files: PatchFiles) -> None:
    """A manifest may name any digest; only an array's own blob begins with its name, dtype and shape."""
    other = files.blobs.put(canonical_json(["b", "float32", [1]]), b"\0\0\0\0")
    arrays = {"a": {"dtype": "float32", "shape": [1], "digest": other}}
    id = files.blobs.put(canonical_json({"arrays": arrays}))
    with pytest.raises(BlobCorrupt, match="not the array a"):
        files.get(id, "0" * 64)


def test_adding_again_heals_a_lost_part(registry: Registry) -> None:
    record = keep(registry, patch_file("one"))
    registry.blobs.discard(PatchFiles(registry.blobs).manifest(record.id).arrays[1].digest)
    assert keep(registry, patch_file("one")) == record
    assert registry.blob(record) == patch_file("one")


def test_bytes_that_have_their_own_digest_for_an_id_are_stored(registry: Registry) -> None:
    record = add_patch(registry, "label")
    assert record.id == record.blob
    assert registry.blob(record) == b"label"


@pytest.mark.parametrize("value", [{"b": [1, 2.5, "ä\u2028"], "a": {"y": None, "x": True}}, {}, {"\ud7ff": -0.0}])
def test_both_writers_of_canonical_json_agree(value: Any) -> None:
    assert canonical_json(value) == canonical_json_of_bases(value)


def _manifest(**changes: Any) -> bytes:
    array = {"dtype": "float32", "shape": [1], "digest": "0" * 64, **changes}
    return canonical_json({"arrays": {"a": array}})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[]", "not a JSON object"),
        (b"{}", "lists no arrays"),
        (b'{"arrays":[]}', "lists no arrays"),
        (b'{"arrays":{"a":1}}', "no description"),
        (b"[" * 200_000, "not JSON"),
        (b'{"arrays":{},"x":' + b"1" * 5000 + b"}", "not JSON"),
        (b" " * (9 << 20), "at most 8388608 bytes"),
        (_manifest()[:-1] + b',"arrays":{}}', "lists no arrays"),
        (_manifest() + b" ", "canonical"),
        (_manifest()[:-1] + b',"x":NaN}', "JSON cannot express"),
        (canonical_json({"arrays": {"x" * 1001: {}}}), "1 to 1000 characters"),
        (canonical_json({"arrays": {"a\nb": {}}}), "characters that print"),
        (canonical_json({"arrays": {"": {}}}), "1 to 1000 characters"),
        (canonical_json({"arrays": {"__metadata__": {}}}), "no description"),
        (_manifest(dtype="object"), "which no patch has"),
        (_manifest(dtype=["float32"]), "which no patch has"),
        (_manifest(shape=[-1]), "no sensible shape"),
        (_manifest(shape=[1.5]), "no sensible shape"),
        (_manifest(shape=[True]), "no sensible shape"),
        (_manifest(shape=[1] * 17), "no sensible shape"),
        (_manifest(shape=[1 << 20, 1 << 20]), "larger than 1024 GiB"),
        (_manifest(shape=[0, 1 << 60]), "larger than 1024 GiB"),
        (_manifest(digest="../../etc/passwd"), "no digest"),
        (_manifest(digest=None), "no digest"),
    ],
    ids=lambda value: value[:30] if isinstance(value, bytes) else None,
)
def test_what_is_no_manifest_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(BadManifest, match=message):
        read_manifest(raw)


def test_a_manifest_in_a_header_bomb_is_not_looked_for() -> None:
    file = (1 << 60).to_bytes(8, "little") + b"{}"
    assert embedded_manifest(file) is None
    assert json.loads(read_manifest(_manifest()).raw)
