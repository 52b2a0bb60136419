"""What is pushed can be pulled, whole and checked, and only what is missing travels."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from overpaint.core.concepts import Concept
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.registry import Registry
from overpaint.registry.files import FileInfo, Files, FolderFiles, RemoteFiles
from overpaint.registry.history import HistoriesDiverged
from overpaint.registry.sharing.documents import (
    CREATED,
    PATCH,
    RECIPE,
    BadLayout,
    base_document,
)
from overpaint.registry.sharing.ingest import MissingBase, PullRequest, import_file, pull
from overpaint.registry.sharing.layout import OciLayout
from overpaint.registry.sharing.sending import WORKERS, export, push
from overpaint.registry.store import BlobCorrupt, open_files, read_manifest
from overpaint.registry.upkeep import verify
from tests.registry.contents import lay
from tests.registry.patch_maker import id_of, keep

from .conftest import FINGERPRINT, LABELS, holdings, is_empty, labelled

ALL = PullRequest()
PREFIXES = (f"pushed-{number}" for number in itertools.count())


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "shared")


def check_round_trip(ours: Registry, theirs: Registry, where: str) -> None:
    sent = push(ours, where)
    assert (len(sent.patches), sent.recipes, sent.newer) == (3, ("safe",), ())
    done = pull(theirs, where, ALL)
    assert set(done.new) == set(sent.patches)
    assert (done.known, done.recipes) == ((), (("safe", "new"),))
    assert holdings(theirs) == holdings(ours)
    assert verify(theirs).problems == ()
    assert theirs.recipe("safe").base == "mine"
    again = push(ours, where)
    assert (again.written, again.nbytes) == (0, 0)
    done = pull(theirs, where, ALL)
    assert (done.new, done.nbytes, done.recipes) == ((), 0, (("safe", "the same"),))


def test_what_is_pushed_to_a_folder_can_be_pulled(ours: Registry, theirs: Registry, place: str) -> None:
    check_round_trip(ours, theirs, place)


def test_what_is_pushed_to_a_url_can_be_pulled(ours: Registry, theirs: Registry) -> None:
    check_round_trip(ours, theirs, f"memory://{next(PREFIXES)}/shared")


def test_what_is_pushed_to_s3_can_be_pulled(ours: Registry, theirs: Registry, bucket: str) -> None:
    check_round_trip(ours, theirs, f"{bucket}/{next(PREFIXES)}")


def test_only_what_is_missing_travels(ours: Registry, theirs: Registry, place: str) -> None:
    first, second, _ = (id_of(labelled(*each)) for each in zip(LABELS, ("apple", "plum", "apple"), strict=True))
    push(ours, place, patches=[first])
    pull(theirs, place, ALL)
    sent = push(ours, place, patches=[second])
    own = 8 * 2 * 4
    # A manifest, its document, and the array that the first patch does not have.
    assert sent.written == 3
    done = pull(theirs, place, ALL)
    assert done.new == (second,)
    assert done.known == (first,)
    assert own < done.nbytes < 2 * own
    assert {record.id for record in theirs.patches()} == {first, second}


def test_a_recipe_brings_all_patches_of_its_history(ours: Registry, theirs: Registry, place: str) -> None:
    push(ours, place, recipes=["safe"])
    pull(theirs, place, PullRequest(recipes=["safe"]))
    assert len(theirs.patches()) == 2
    assert theirs.log("safe") == ours.log("safe")
    assert theirs.recipe("safe@2").entries == ours.recipe("safe@2").entries


def test_a_recipe_that_was_worked_on_catches_up(ours: Registry, theirs: Registry, place: str) -> None:
    push(ours, place)
    pull(theirs, place, ALL)
    third = next(record.id for record in ours.patches() if record.id not in dict(ours.recipe("safe").patches))
    lay(ours, "safe", third, 2.0, why="another takedown")
    ours.tag("final", recipes=["safe"], who="Ada")
    push(ours, place)
    assert pull(theirs, place, ALL).recipes == (("safe", "updated"),)
    assert holdings(theirs) == holdings(ours)
    assert theirs.recipe("safe@final").revision == 5
    assert [found.name for found in theirs.search("another takedown").recipes] == ["safe"]
    assert verify(theirs).problems == ()


def test_a_recipe_that_is_newer_where_it_goes_is_left_alone(ours: Registry, theirs: Registry, place: str) -> None:
    push(ours, place)
    pull(theirs, place, ALL)
    lay(theirs, "safe", theirs.patches()[2].id, 1.0)
    assert pull(theirs, place, ALL).recipes == (("safe", "newer here"),)
    assert push(theirs, place).recipes == ("safe",)
    sent = push(ours, place)
    assert (sent.recipes, sent.newer) == ((), ("safe",))
    assert pull(ours, place, ALL).recipes == (("safe", "updated"),)
    assert holdings(theirs) == holdings(ours)


def test_recipes_that_went_different_ways_are_refused_on_both_sides(
    ours: Registry, theirs: Registry, place: str
) -> None:
    push(ours, place)
    pull(theirs, place, ALL)
    for registry, strength in ((ours, 3.0), (theirs, 4.0)):
        lay(registry, "safe", registry.patches()[2].id, strength)
    push(ours, place)
    before = holdings(theirs), open_files(place).read("index.json")
    with pytest.raises(HistoriesDiverged, match="from revision 5 on"):
        pull(theirs, place, ALL)
    with pytest.raises(HistoriesDiverged, match="from revision 5 on"):
        push(theirs, place)
    assert (holdings(theirs), open_files(place).read("index.json")) == before
    assert pull(theirs, place, PullRequest(recipes=["safe"], name="their safe")).recipes == (("their safe", "new"),)
    assert theirs.log("their safe")[-1].strength_after == 3.0


def test_another_name_is_for_one_recipe(ours: Registry, theirs: Registry, place: str) -> None:
    ours.create_recipe("empty", "sd15")
    push(ours, place)
    with pytest.raises(OverpaintError, match="this would take 2"):
        pull(theirs, place, PullRequest(name="x"))
    assert theirs.patches() == []


def test_one_patch_can_be_pulled_by_id_by_its_beginning_and_by_concept(
    ours: Registry, theirs: Registry, place: str
) -> None:
    push(ours, place)
    plum = id_of(labelled("two", "plum"))
    assert pull(theirs, place, PullRequest(patches=[plum[:8].upper()])).new == (plum,)
    assert pull(theirs, place, PullRequest(patches=["plum"])).known == (plum,)
    assert len(pull(theirs, place, PullRequest(patches=["apple", plum])).new) == 2
    for request in (PullRequest(patches=["pear"]), PullRequest(patches=[plum[:3]]), PullRequest(recipes=["unsafe"])):
        with pytest.raises(NotFound, match="has no"):
            pull(theirs, place, request)


def test_a_base_that_is_not_here_is_named_and_nothing_is_taken(ours: Registry, place: str, tmp_path: Path) -> None:
    push(ours, place)
    other = Registry.open(tmp_path / "other")
    other.add_base("another", Path("/x"), "stable-diffusion", "d" * 64)
    with pytest.raises(MissingBase, match=f"{FINGERPRINT}.*overpaint base add"):
        pull(other, place, ALL)
    assert is_empty(other)
    assert list(other.blobs.digests()) == []


def test_a_concept_that_is_known_otherwise_stays_as_it_is_and_that_is_said(
    ours: Registry, theirs: Registry, place: str
) -> None:
    theirs.add_concept(Concept("apple", synonyms=("fruit",)))
    push(ours, place)
    said: list[str] = []
    pull(theirs, place, PullRequest(warn=said.append))
    assert theirs.concept("apple") == Concept("apple", synonyms=("fruit",))
    assert len(said) == 2
    assert "known here with other synonyms" in said[0]
    assert verify(theirs).problems == ()


def test_every_new_patch_is_shown_to_the_check_before_anything_is_written(
    ours: Registry, theirs: Registry, place: str
) -> None:
    push(ours, place)
    seen: list[bytes] = []

    def check(file: bytes) -> None:
        seen.append(file)
        if len(seen) == 3:
            raise OverpaintError("this one will not do")

    with pytest.raises(OverpaintError, match="will not do"):
        pull(theirs, place, PullRequest(check=check))
    assert is_empty(theirs)
    assert sorted(seen) == sorted(ours.blob(record) for record in ours.patches())


def test_a_patch_that_lost_bytes_here_is_healed_by_pulling(ours: Registry, place: str) -> None:
    push(ours, place)
    record = ours.patches()[0]
    ours.blobs.discard(record.id)
    assert pull(ours, place, ALL).new == (record.id,)
    assert ours.blob(record) == labelled("one")


def test_a_damaged_array_here_is_replaced_by_the_one_that_comes(ours: Registry, theirs: Registry, place: str) -> None:
    push(ours, place)
    pull(theirs, place, PullRequest(patches=["plum"]))
    shared = next(
        array.digest
        for array in Layoutish(place).arrays(id_of(labelled("two", "plum")))
        if array.name.endswith("shared")
    )
    theirs.blobs.files.write(f"blobs/sha256/{shared[:2]}/{shared}", [b"damaged"])
    pull(theirs, place, ALL)
    assert holdings(theirs) == holdings(ours)


class Layoutish:
    """Reads a pushed folder by hand."""

    def __init__(self, place: str) -> None:
        self.folder = Path(place)

    def json(self, digest: str) -> Any:
        return json.loads((self.folder / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes())

    def index(self) -> list[Any]:
        found: list[Any] = json.loads((self.folder / "index.json").read_bytes())["manifests"]
        return found

    def arrays(self, id: str) -> Any:
        return read_manifest((self.folder / "blobs" / "sha256" / id).read_bytes()).arrays


def test_the_folder_is_an_oci_image_layout(ours: Registry, place: str) -> None:
    push(ours, place)
    layout = Layoutish(place)
    assert json.loads((Path(place) / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    reached = set()

    def walk(descriptor: Any) -> None:
        data = (Path(place) / "blobs" / "sha256" / descriptor["digest"].removeprefix("sha256:")).read_bytes()
        assert len(data) == descriptor["size"]
        assert descriptor["digest"] == "sha256:" + hashlib.sha256(data).hexdigest()
        if descriptor["digest"] in reached:
            return
        reached.add(descriptor["digest"])
        if descriptor["mediaType"].startswith("application/vnd.oci.image."):
            content = json.loads(data)
            assert content["mediaType"] == descriptor["mediaType"]
            children = [*content.get("manifests", []), *content.get("layers", [])]
            for child in (*children, *(content[key] for key in ("config", "subject") if key in content)):
                walk(child)

    for entry in layout.index():
        walk(entry)
    assert {f"sha256:{path.name}" for path in (Path(place) / "blobs" / "sha256").iterdir()} == reached


def test_a_patchs_id_is_the_digest_of_its_documents_config_and_the_base_its_subject(ours: Registry, place: str) -> None:
    push(ours, place)
    layout = Layoutish(place)
    for entry in layout.index():
        content = layout.json(entry["digest"])
        if entry["artifactType"] == PATCH:
            id = content["config"]["digest"].removeprefix("sha256:")
            assert ours.patch(id).concept == entry["annotations"]["org.overpaint.name"]
            assert content["subject"] == base_document(FINGERPRINT).descriptor.as_json()
            assert layout.json(content["subject"]["digest"])["annotations"] == {
                "org.overpaint.base.fingerprint": FINGERPRINT
            }
    assert [entry["artifactType"] for entry in layout.index()] == [PATCH] * 3 + [RECIPE]


def test_two_registries_push_the_same_patch_as_the_same_bytes(ours: Registry, theirs: Registry, tmp_path: Path) -> None:
    theirs.add_concept(Concept("apple", anchor="pear"))
    theirs.blobs.put(labelled("one"))  # one keeps it in parts, the other as a whole file
    keep(theirs, labelled("one"), base="mine")
    for registry, folder in ((ours, "a"), (theirs, "b")):
        push(registry, tmp_path / folder, patches=[id_of(labelled("one"))])
        OciLayout(open_files(tmp_path / folder)).update(
            lambda entries: [replace(each, annotations={}) for each in entries]  # they were solved at other times
        )
    a, b = (
        {
            path.relative_to(tmp_path / folder): path.read_bytes()
            for path in (tmp_path / folder).rglob("*")
            if path.is_file()
        }
        for folder in "ab"
    )
    assert a == b


def test_a_push_that_was_killed_is_finished_by_the_next(
    ours: Registry, theirs: Registry, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = FolderFiles.write, [7]

    def write_some(files: FolderFiles, name: str, chunks: Any, **rest: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        write(files, name, chunks, **rest)

    monkeypatch.setattr(FolderFiles, "write", write_some)
    with pytest.raises(KeyboardInterrupt):
        push(ours, place)
    monkeypatch.undo()
    with pytest.raises(NotFound, match="no push was finished"):
        pull(theirs, place, ALL)
    check_round_trip(ours, theirs, place)


def test_two_pushes_at_once_are_both_listed(ours: Registry, tmp_path: Path, place: str) -> None:
    ids = [record.id for record in ours.patches()]
    threads = [threading.Thread(target=push, args=(ours, place), kwargs={"patches": [id]}) for id in ids * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(OciLayout(open_files(place)).entries()) == 3


def test_a_list_that_somebody_else_overwrites_is_written_again(ours: Registry) -> None:
    """Behind a URL nobody can be kept waiting, so the list is looked at once more after it was written."""
    where = f"memory://{next(PREFIXES)}/shared"
    files = open_files(where)
    push(ours, where, patches=[ours.patches()[0].id])
    before = files.read("index.json")
    assert before is not None
    write, overwritten = RemoteFiles.write, list[str]()

    def write_and_lose(this: RemoteFiles, name: str, chunks: Any, **rest: Any) -> None:
        write(this, name, chunks, **rest)
        if name == "index.json" and not overwritten:
            overwritten.append(name)
            write(this, name, [before], **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RemoteFiles, "write", write_and_lose)
        push(ours, where, patches=[ours.patches()[1].id])
    assert overwritten
    assert len(OciLayout(files).entries()) == 2


def test_what_cannot_be_read_here_is_not_pushed(ours: Registry, place: str) -> None:
    record = ours.patches()[0]
    files: Files = ours.blobs.files
    found: FileInfo | None = files.info(f"blobs/sha256/{record.id[:2]}/{record.id}")
    assert found is not None
    files.write(found.name, [b"{}"])
    with pytest.raises(BlobCorrupt, match=record.id):
        push(ours, place)
    assert not os.path.exists(f"{place}/index.json")


def test_pulling_from_where_nothing_is_says_so(theirs: Registry, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nothing was ever pushed"):
        pull(theirs, tmp_path / "nowhere", ALL)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("kind", ["folder", "url"])
def test_a_damaged_blob_in_a_shared_place_is_mended_by_the_next_push(
    ours: Registry, theirs: Registry, place: str, kind: str
) -> None:
    where = place if kind == "folder" else f"memory://{next(PREFIXES)}"
    push(ours, where)
    files = open_files(where)
    names = [each.name for each in files.walk("blobs")]
    for name in names:
        sound = files.read(name) or b""
        files.write(name, [sound[:-1], bytes([sound[-1] ^ 1])])
    with pytest.raises(OverpaintError):
        pull(theirs, where, ALL)
    assert is_empty(theirs)
    assert push(ours, where).written == len(names)
    pull(theirs, where, ALL)
    assert holdings(theirs) == holdings(ours)


def test_a_large_damaged_blob_behind_a_url_is_mended_when_a_push_is_asked_to_check(
    ours: Registry, theirs: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overpaint.registry.sharing.layout.REHASHED", 100)
    where, plum = f"memory://{next(PREFIXES)}", id_of(labelled("two", "plum"))
    push(ours, where)
    name = f"blobs/sha256/{plum}"
    open_files(where).write(name, [bytes(len(open_files(where).read(name) or b""))])
    assert push(ours, where).written == 0
    with pytest.raises(BadLayout, match="damaged or altered"):
        pull(theirs, where, ALL)
    assert push(ours, where, check=True).written == 1
    assert plum in pull(theirs, where, ALL).new


def solved(registry: Registry, label: str, days: int, base: str = "sd15") -> str:
    """Add a patch of the apple that was solved some days ago; returns its id."""
    moment = datetime.now(timezone.utc) - timedelta(days=days)
    return keep(registry, labelled(label), base=base, solved_at=moment).id


@pytest.mark.parametrize("way", ["push", "export"])
def test_the_newest_patch_of_a_concept_is_the_same_after_a_pull(
    ours: Registry, theirs: Registry, tmp_path: Path, way: str
) -> None:
    newest, *_ = [solved(ours, f"solved {days} days ago", days) for days in range(-3, 5)]
    theirs.add_concept(Concept("apple", anchor="pear"))
    if way == "push":
        push(ours, tmp_path / "shared")
        pull(theirs, tmp_path / "shared", ALL)
    else:
        export(ours, tmp_path / "shared")
        import_file(theirs, tmp_path / "shared", ALL)
    times = [{each.id: each.solved_at for each in registry.patches()} for registry in (ours, theirs)]
    assert ours.patch("apple").id == newest
    assert {id: moment for id, moment in times[0].items() if moment < datetime.now(timezone.utc)}.items() <= times[
        1
    ].items()


def test_ones_own_newer_patch_stays_the_newest_after_a_pull(ours: Registry, theirs: Registry, place: str) -> None:
    theirs.add_concept(Concept("apple", anchor="pear"))
    older = solved(ours, "older", 2)
    push(ours, place, patches=[older])
    mine = solved(theirs, "mine", 1, base="mine")
    assert pull(theirs, place, ALL).new == (older,)
    assert theirs.patch("apple").id == mine


@pytest.mark.parametrize("claimed", ["2999-01-01T00:00:00+00:00", "yesterday", ""])
def test_a_time_of_solving_that_cannot_be_is_not_believed(
    ours: Registry, theirs: Registry, place: str, claimed: str
) -> None:
    theirs.add_concept(Concept("apple", anchor="pear"))
    push(ours, place, patches=["plum"])
    OciLayout(open_files(place)).update(
        lambda entries: [replace(each, annotations={**each.annotations, CREATED: claimed}) for each in entries]
    )
    before = datetime.now(timezone.utc)
    pull(theirs, place, ALL)
    assert before <= theirs.patch("plum").solved_at <= datetime.now(timezone.utc)


def test_the_time_of_solving_stays_the_earliest_that_is_known(ours: Registry, theirs: Registry, place: str) -> None:
    first = solved(ours, "early", 9)
    push(ours, place, patches=[first])
    theirs.add_concept(Concept("apple", anchor="pear"))
    solved(theirs, "early", 1, base="mine")
    push(theirs, place)
    (entry,) = OciLayout(open_files(place)).entries()
    assert entry.created == ours.patch(first).solved_at


def test_one_name_is_no_list_of_names(ours: Registry, theirs: Registry, place: str) -> None:
    push(ours, place)
    for names in ("safe", 7):
        with pytest.raises(OverpaintError, match="list of texts"):
            push(ours, place, recipes=names)  # type: ignore[arg-type]
        with pytest.raises(OverpaintError, match="list of texts"):
            pull(theirs, place, PullRequest(recipes=names))  # type: ignore[arg-type]
    assert pull(theirs, place, PullRequest(recipes=(each for each in ["safe"]))).recipes


@pytest.mark.parametrize("full", ["blobs/", "oci-layout", "index.json"])
def test_a_push_to_a_full_place_leaves_no_layout_behind(
    ours: Registry, place: str, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    write = FolderFiles.write

    def write_until_full(files: FolderFiles, name: str, chunks: Any, **rest: Any) -> None:
        if name.startswith(full):
            raise OverpaintError("no inodes are left")
        write(files, name, chunks, **rest)

    monkeypatch.setattr(FolderFiles, "write", write_until_full)
    with pytest.raises(OverpaintError, match="no inodes are left"):
        push(ours, place)
    left = [path.name for path in Path(place).rglob("*") if path.is_file() and "blobs" not in path.parts]
    assert left in ([], [".lock"])


def test_many_patches_are_sent_at_a_time_and_few_are_in_memory(
    ours: Registry, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(60):
        keep(ours, labelled(f"more {number}"), base="sd15")
    at_work, most, lock, put = [0], [0], threading.Lock(), OciLayout.put

    def counted(layout: OciLayout, *arguments: Any) -> int:
        with lock:
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
        time.sleep(0.002)
        try:
            return put(layout, *arguments)
        finally:
            with lock:
                at_work[0] -= 1

    monkeypatch.setattr(OciLayout, "put", counted)
    assert len(push(ours, place).patches) == 63
    assert 1 < most[0] <= WORKERS


def test_the_first_patch_that_cannot_be_sent_stops_the_rest(
    ours: Registry, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(60):
        keep(ours, labelled(f"more {number}"), base="sd15")
    asked: list[str] = []

    def refusing(layout: OciLayout, digest: str, *rest: Any) -> int:
        asked.append(digest)
        if len(asked) == 10:
            raise OverpaintError("no more")
        return 1

    monkeypatch.setattr(OciLayout, "put", refusing)
    with pytest.raises(OverpaintError, match="no more"):
        push(ours, place)
    assert len(asked) < 120
    assert not Path(place, "index.json").exists()
