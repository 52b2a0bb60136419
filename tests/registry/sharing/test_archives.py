"""One file holds everything that is needed, is the same bytes every time, and is there whole or not at all."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest

from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.registry import Registry
from overpaint.registry.files import LOCK
from overpaint.registry.sharing.ingest import MissingBase, PullRequest, import_file, pull
from overpaint.registry.sharing.sending import export, push
from overpaint.registry.store import BlobMissing
from overpaint.registry.upkeep import verify
from tests.registry.contents import lay
from tests.registry.patch_maker import id_of

from .conftest import holdings, is_empty, labelled

ALL = PullRequest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "shared.overpaint"


def test_what_is_exported_can_be_imported(ours: Registry, theirs: Registry, file: Path) -> None:
    sent = export(ours, file)
    done = import_file(theirs, file, ALL)
    assert set(done.new) == set(sent.patches)
    assert done.recipes == (("safe", "new"),)
    assert holdings(theirs) == holdings(ours)
    assert verify(theirs).problems == ()
    assert import_file(theirs, file, ALL).known == sent.patches


def test_a_recipe_is_exported_with_its_whole_history(ours: Registry, theirs: Registry, file: Path) -> None:
    ours.tag("safe-2026-11", recipes=["safe"], who="Ada")
    export(ours, file, recipes=["safe"])
    import_file(theirs, file, ALL)
    assert theirs.log("safe") == ours.log("safe")
    assert theirs.recipe("safe@safe-2026-11") is not None
    for number in range(5):
        assert theirs.recipe(f"safe@{number}").entries == ours.recipe(f"safe@{number}").entries


def test_the_same_content_is_the_same_file(ours: Registry, theirs: Registry, tmp_path: Path) -> None:
    export(ours, tmp_path / "a")
    export(ours, tmp_path / "b")
    import_file(theirs, tmp_path / "a", ALL)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    export(theirs, tmp_path / "c", patches=["plum"])
    export(ours, tmp_path / "d", patches=["plum"])
    assert (tmp_path / "c").read_bytes() == (tmp_path / "d").read_bytes()


def test_an_archive_is_a_plain_tar_of_an_oci_layout(
    ours: Registry, file: Path, tmp_path: Path, theirs: Registry
) -> None:
    """Other programs may unpack it and find what `push` writes."""
    export(ours, file)
    push(ours, tmp_path / "pushed")
    with tarfile.open(file, "r:") as archive:
        assert {(member.uid, member.mtime, member.uname, member.mode) for member in archive} == {(0, 0, "", 0o644)}
        archive.extractall(tmp_path / "unpacked", filter="data")
    unpacked, pushed = (
        {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "unpacked", tmp_path / "pushed")
    )
    pushed.pop(LOCK, None)  # a folder that several write to keeps the file that they lock
    assert unpacked == pushed
    pull(theirs, tmp_path / "unpacked", ALL)
    assert holdings(theirs) == holdings(ours)


def test_a_bare_patch_file_can_be_imported(ours: Registry, theirs: Registry, tmp_path: Path) -> None:
    bare = tmp_path / "patch.safetensors"
    bare.write_bytes(labelled("one"))
    assert import_file(theirs, bare, ALL).new == (id_of(labelled("one")),)
    assert import_file(theirs, bare, ALL).known == (id_of(labelled("one")),)
    assert theirs.blob(theirs.patch("apple")) == labelled("one")
    assert verify(theirs).problems == ()
    other = Registry.open(tmp_path / "other")
    with pytest.raises(MissingBase):
        import_file(other, bare, ALL)
    assert list(other.blobs.digests()) == []


def test_an_export_that_fails_leaves_nothing(ours: Registry, file: Path) -> None:
    lost = ours.patches()[2]
    ours.blobs.discard(lost.id)
    before = set(file.parent.iterdir())
    with pytest.raises(BlobMissing, match=f"the bytes of patch {lost.id[:12]} for '{lost.concept}' cannot be read"):
        export(ours, file)
    assert set(file.parent.iterdir()) == before


def test_an_export_replaces_nothing(ours: Registry, file: Path) -> None:
    file.write_text("mine")
    with pytest.raises(AlreadyExists, match="is already there"):
        export(ours, file)
    assert file.read_text() == "mine"
    with pytest.raises(NotFound, match="no folder"):
        export(ours, file / "below" / "x")


def test_a_file_that_appears_during_an_export_is_not_replaced(
    ours: Registry, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def appear(descriptor: int) -> None:
        fsync(descriptor)
        file.write_text("mine")

    monkeypatch.setattr(os, "fsync", appear)
    with pytest.raises(AlreadyExists):
        export(ours, file)
    assert file.read_text() == "mine"
    assert [path.name for path in file.parent.iterdir() if path != file and path.is_file()] == []


def test_unknown_names_are_said_before_anything_is_written(ours: Registry, file: Path) -> None:
    for patches, recipes in ((["pear"], []), ([], ["unsafe"])):
        with pytest.raises(NotFound):
            export(ours, file, patches=patches, recipes=recipes)
    assert not file.exists()


@pytest.mark.parametrize("keep", [0, 100, 600, 1024, 5000, -1024, -1])
def test_an_archive_that_was_cut_short_is_refused(ours: Registry, theirs: Registry, file: Path, keep: int) -> None:
    export(ours, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(OverpaintError):
        import_file(theirs, file, ALL)
    assert is_empty(theirs)


def test_every_flipped_byte_of_an_archive_is_noticed_or_means_nothing(
    ours: Registry, theirs: Registry, file: Path
) -> None:
    """A byte of padding or of a header's unused field may change; no patch and no recipe ever does."""
    lay(ours, "safe", ours.patches()[2].id, 1.0)
    export(ours, file)
    data, refused = file.read_bytes(), 0
    for position in range(0, len(data), 1021):
        file.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        try:
            import_file(theirs, file, ALL)
        except OverpaintError:
            refused += 1
        else:
            assert holdings(theirs) == holdings(ours)
    assert refused > len(data) // 1021 // 2
    file.write_bytes(data)
    import_file(theirs, file, ALL)
    assert holdings(theirs) == holdings(ours)


def test_a_record_tells_no_paths(ours: Registry, file: Path) -> None:
    """Where a base lies on somebody's disk is nobody else's business."""
    export(ours, file)
    assert b"/models/sd15" not in file.read_bytes()
    assert json.dumps("sd15").encode() in file.read_bytes()
