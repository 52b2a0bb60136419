"""Verify names everything that is not as it was, with the patch and the tensor it belongs to."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from overpaint.core.concepts import Concept
from overpaint.core.errors import OverpaintError
from overpaint.registry import PatchRecord, Registry, queries
from overpaint.registry import registry as registry_module
from overpaint.registry.store import BlobStore, PatchFiles
from overpaint.registry.upkeep import VERIFY_LEDGER, Problem, row_problems, verify

from .contents import lay, stock
from .patch_maker import keep, numbers, patch_file
from .store_contract import name_of

TENSORS = ("unet/a", "unet/b", "unet/c", "unet/d")
Owners = dict[str, set[tuple[str, str | None]]]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry of 42 patches in parts and a recipe; made once, without waiting for the disk."""
    folder = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        registry = stock(Registry.open(folder))
        for number in range(42):
            keep(registry, patch_file(str(number), {name: numbers(f"{name} {number}", 4, 4) for name in TENSORS}))
    registry.create_recipe("r", "small")
    first, second, third = (patch.id for patch in registry.patches(limit=3))
    for patch_id, strength in ((first, 1.0), (second, 1.0), (third, 1.0), (first, 0.5), (second, None)):
        lay(registry, "r", patch_id, strength)
    return folder


@pytest.fixture
def full(filled: Path, folder: Path) -> Registry:
    shutil.copytree(filled, folder)
    return Registry.open(folder, create=False)


def owners(registry: Registry) -> Owners:
    """Of every blob that is not a whole file, the patches and tensors it belongs to; a manifest is of no tensor."""
    files, found = PatchFiles(registry.blobs), Owners()
    for record in registry.patches():
        if registry.blobs.exists(record.id):
            found.setdefault(record.id, set()).add((record.id, None))
            for array in files.manifest(record.id).arrays:
                found.setdefault(array.digest, set()).add((record.id, array.name))
    return found


def path_of(registry: Registry, digest: str) -> Path:
    return registry.folder / name_of(digest)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.chmod(0o644)
    path.write_bytes(data)


def test_a_sound_registry_has_no_problems(full: Registry) -> None:
    found = verify(full)
    assert found.problems == ()
    assert (found.patches, found.blobs) == (42, len(list(full.blobs.digests())))
    assert found.nbytes == sum(blob.nbytes for blob in full.blobs.blobs())


def test_one_flipped_bit_in_any_of_200_blobs_is_reported_with_its_patch_and_tensor(full: Registry) -> None:
    """Every blob of every patch in its turn: first all manifests, then the first array of each, and so on."""
    source, flipped = random.Random(4), 0
    for tensor in (None, *TENSORS):
        known = {digest: whose for digest, whose in owners(full).items() if {each[1] for each in whose} == {tensor}}
        before = {digest: path_of(full, digest).read_bytes() for digest in known}
        for digest, data in before.items():
            flip(path_of(full, digest), source.randrange(8 * len(data)))
        problems = verify(full).problems
        assert len(problems) == len(known)
        for problem in problems:
            (digest,) = (digest for digest, whose in known.items() if (problem.patch, problem.tensor) in whose)
            assert digest in problem.found
            assert not path_of(full, digest).exists(), "it went to quarantine"
            path_of(full, digest).write_bytes(before[digest])
        flipped += len(problems)
    assert flipped > 200
    assert len(list((full.folder / "quarantine").iterdir())) == flipped
    assert verify(full).problems == ()


def test_one_flipped_bit_in_an_array_of_many_patches_is_reported_with_all_of_them(registry: Registry) -> None:
    shared = numbers("shared", 8, 8)
    ids = {keep(registry, patch_file(str(n), {"unet/shared": shared, "unet/own": numbers(n, 2)})).id for n in range(3)}
    ((digest, whose),) = ((digest, whose) for digest, whose in owners(registry).items() if len(whose) == 3)
    flip(path_of(registry, digest), 999)
    assert {(each.patch, each.tensor) for each in verify(registry).problems} == whose
    assert whose == {(id, "unet/shared") for id in ids}


def test_one_flipped_bit_in_a_whole_file_is_reported_with_its_patch_and_tensor(registry: Registry) -> None:
    source = random.Random(5)
    for label in ("one", "two"):
        registry.blobs.put(patch_file(label))
        keep(registry, patch_file(label))
    for record in registry.patches() * 15:
        path = path_of(registry, record.blob)
        data = path.read_bytes()
        bit = source.randrange(8 * len(data))
        flip(path, bit)
        (problem,) = verify(registry).problems
        assert problem.patch == record.id
        assert (problem.tensor or problem.part) in _parts_at(data, bit // 8)
        path.write_bytes(data)


def _parts_at(file: bytes, offset: int) -> set[str]:
    """What a person would call the byte at `offset`: read from the file by hand."""
    length = int.from_bytes(file[:8], "little")
    if offset < 8 + length:
        return {"manifest", "header"}
    header = json.loads(file[8 : 8 + length])
    start = offset - 8 - length
    return {
        name
        for name, entry in header.items()
        if name != "__metadata__" and entry["data_offsets"][0] <= start < entry["data_offsets"][1]
    }


def test_a_lost_blob_is_reported_with_its_patch_and_tensor(full: Registry) -> None:
    for digest, whose in list(owners(full).items())[:5]:
        data = path_of(full, digest).read_bytes()
        full.blobs.discard(digest)
        problems = verify(full).problems
        assert {(each.patch, each.tensor) for each in problems} == whose
        path_of(full, digest).write_bytes(data)


def test_damage_that_belongs_to_no_patch_is_reported_too(full: Registry) -> None:
    digest = full.blobs.put(b"left by a writer that was killed")
    assert verify(full).problems == ()
    flip(path_of(full, digest), 0)
    (problem,) = verify(full).problems
    assert (problem.part, problem.patch, problem.tensor) == ("blob", None, None)
    assert digest in problem.found


def _run(*statements: str) -> Callable[[sqlite3.Connection], None]:
    def run(connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA foreign_keys = OFF")
        for statement in statements:
            connection.execute(statement)

    return run


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_run("UPDATE patch SET nbytes = nbytes + 1 WHERE id = '{id}'"), "gives it the size"),
        (_run("UPDATE patch SET kind = 'dense' WHERE id = '{id}'"), "gives it the kind 'dense'"),
        (_run("UPDATE patch SET solver = 'other' WHERE id = '{id}'"), "gives it the solver 'other'"),
        (_run("UPDATE patch SET blob = '" + "0" * 64 + "' WHERE id = '{id}'"), "but make the file"),
        (_run("UPDATE base SET fingerprint = 'e'"), "gives it the base 'e'"),
        (_run("UPDATE concept SET name = 'plum', definition = replace(definition, 'apple', 'plum')"), "concept 'plum'"),
        (_run("UPDATE concept SET definition = '{'"), "the concept 'apple' cannot be read"),
        (_run("UPDATE concept SET definition = '[]'"), "the concept 'apple' cannot be read"),
        (_run("UPDATE concept SET kind = 'style'"), r"'apple' \(style\) is defined as 'apple' \(object\)"),
        (_run("UPDATE patch SET settings = 'x' WHERE id = '{id}'"), "settings of patch {id} cannot be read"),
        (
            _run("DELETE FROM revision_patch", "DELETE FROM revision WHERE number = 2"),
            "at revision 5, and its history has",
        ),
        (_run("UPDATE recipe_patch SET strength = 3"), "are not those of its history"),
        (_run("DELETE FROM recipe_patch"), "are not those of its history"),
        (
            _run("UPDATE patch SET solved_at = 'Tuesday' WHERE id = '{id}'"),
            "the solved_at of a row of patch is damaged: 'Tuesday' where a time belongs, in .'{id}'",
        ),
        (_run("UPDATE recipe_patch SET until = 'x'"), "the until of a row of recipe_patch is damaged"),
        (_run("UPDATE revision SET at = 'x'"), "the at of a row of revision is damaged: 'x' where a time belongs"),
        (_run("UPDATE patch SET kind = x'ff' WHERE id = '{id}'"), "the kind of a row of patch is damaged"),
        (_run("UPDATE patch_text SET text = x'ff'"), "the text of a row of patch_text is damaged"),
        (_run("UPDATE recipe_patch SET strength = 9e999"), "inf where a number belongs"),
        (_run("UPDATE concept SET name = CAST(x'ff' AS TEXT)"), "is damaged .Could not decode to UTF-8"),
        (_run("DELETE FROM base"), "refers to a base that is not there"),
        (
            _run(
                "INSERT INTO base (name, source, layout, fingerprint, added_at) VALUES ('b', '', '', 'e', '2026-01-01')",
                "UPDATE recipe SET base_id = 2",
            ),
            "which has another base",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_row_that_says_something_else_is_reported(
    full: Registry, spoil: Callable[[sqlite3.Connection], None], message: str
) -> None:
    record = full.patches()[7]

    class Filled(sqlite3.Connection):
        def execute(self, statement: str, *rest: Any) -> sqlite3.Cursor:
            return super().execute(statement.replace("{id}", record.id), *rest)

    with closing(sqlite3.connect(full.folder / "registry.db", factory=Filled)) as connection, connection:
        spoil(connection)
    found = verify(full).problems
    assert any(_matches(problem, message.replace("{id}", record.id)) for problem in found), found


def _matches(problem: Problem, message: str) -> bool:
    return re.search(message, problem.found) is not None


def test_a_damaged_database_is_reported(full: Registry) -> None:
    path = full.folder / "registry.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        ((root,),) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'ix_patch_solver_solved_at_id'"
        )
        ((size,),) = connection.execute("PRAGMA page_size")
    data = bytearray(path.read_bytes())
    start = (root - 1) * size
    data[start + 100 : start + size] = bytes(size - 100)
    path.write_bytes(data)
    problems = verify(full).problems
    assert problems
    assert "the database is damaged" in problems[0].found


def test_a_concept_in_decomposed_unicode_is_the_concept(registry: Registry) -> None:
    concept = Concept("cafe\u0301")
    registry.add_concept(Concept("caf\u00e9"))
    keep(registry, patch_file("one", concept=concept))
    assert verify(registry).problems == ()


def test_verify_reports_progress(full: Registry) -> None:
    said: list[tuple[int, int]] = []
    verify(full, progress=lambda step, of, text: said.append((step, of)))
    assert said == [(step, 42) for step in range(1, 43)]


def interrupted_at(stop: int) -> Callable[[int, int, str], None]:
    """A progress callback that stops the work at a step, as Ctrl-C does."""

    def progress(step: int, of: int, text: str) -> None:
        if step == stop:
            raise KeyboardInterrupt

    return progress


def test_a_verification_that_was_stopped_goes_on_where_it_was(full: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged, *_ = sorted(record.id for record in full.patches())
    flip(path_of(full, damaged), 100)
    with pytest.raises(KeyboardInterrupt):
        verify(full, progress=interrupted_at(30))
    assert (full.folder / VERIFY_LEDGER).exists()
    read: list[str] = []
    get = BlobStore.get

    def counted(store: BlobStore, digest: str) -> bytes:
        read.append(digest)
        return get(store, digest)

    monkeypatch.setattr(BlobStore, "get", counted)
    found = verify(full, resume=True)
    assert len(read) < 14 * 5
    assert (found.patches, {problem.patch for problem in found.problems}) == (42, {damaged})
    assert not (full.folder / VERIFY_LEDGER).exists()
    read.clear()
    assert verify(full).patches == 42
    assert len(read) > 41 * 5


def test_two_verifications_at_a_time_do_not_meet(full: Registry) -> None:
    within: list[int] = []

    def another(step: int, of: int, text: str) -> None:
        if step == 20:
            within.append(len(verify(full).problems))

    assert (verify(full, progress=another).problems, within) == ((), [0])


def test_a_patch_without_any_bytes_is_reported(registry: Registry) -> None:
    record: PatchRecord = keep(registry, patch_file("one"))
    for digest in list(registry.blobs.digests()):
        registry.blobs.discard(digest)
    (problem,) = verify(registry).problems
    assert (problem.patch, problem.concept) == (record.id, "apple")
    assert record.id in problem.found


def _with_digests(registry: Registry) -> None:
    """A recipe of four revisions, the last one like the second."""
    first, second = (patch.id for patch in registry.patches(limit=2))
    registry.create_recipe("d", "small")
    base = registry.base("small").fingerprint
    steps = [(first, 1.0, base, "a1"), (second, 1.0, "a1", "a2"), (second, None, "a2", "a1"), (first, None, "a1", base)]
    for patch, strength, before, after in steps:
        lay(registry, "d", patch, strength, digests=(before, after))


@pytest.mark.parametrize("column", ["digest_before", "digest_after"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_recorded_digest_that_was_overwritten_is_noticed(full: Registry, number: int, column: str) -> None:
    _with_digests(full)
    assert row_problems(full) == []
    with closing(sqlite3.connect(full.folder / "registry.db")) as database, database:
        where = "recipe_id = (SELECT id FROM recipe WHERE name = 'd') AND number = ?"
        database.execute(f"UPDATE revision SET {column} = ? WHERE {where}", ("f" * 64, number))
    assert any("for the same patches" in problem and "f" * 64 in problem for problem in row_problems(full))


DAMAGE: dict[str, tuple[str, Callable[[Registry], object]]] = {
    "settings": ("UPDATE patch SET settings = '{'", Registry.patches),
    "settings of another kind": ("UPDATE patch SET settings = '[]'", Registry.patches),
    "a seed": ("UPDATE patch SET seed = 'seven'", Registry.patches),
    "a time": ("UPDATE patch SET solved_at = 'yesterday'", Registry.patches),
    "a patch without concept": ("UPDATE patch SET concept_id = 99999", Registry.patches),
    "a definition": ("UPDATE concept SET definition = 'x'", Registry.concepts),
    "an empty definition": ("UPDATE concept SET definition = '{}'", Registry.concepts),
    "a strength": ("UPDATE recipe_patch SET strength = 'much'", Registry.recipes),
    "a day": ("UPDATE recipe_patch SET until = 'soon'", Registry.recipes),
    "a strength in the history": ("UPDATE revision_patch SET strength_after = 'x'", lambda each: each.log("r")),
    "a name that is no text": ("UPDATE concept SET name = x'ff'", lambda each: each.concept("apples")),
    "a lost patch in a list": ("DELETE FROM patch", lambda each: each.patches_on("r")),
    "a lost patch in the history": ("DELETE FROM patch", lambda each: each.log("r")),
    "a lost patch in a comparison": ("DELETE FROM patch", lambda each: each.diff("r@1", "r")),
    "a lost patch in a search": ("DELETE FROM patch", lambda each: each.search("apple")),
    "a lost concept in the history": ("DELETE FROM concept", lambda each: each.log("r")),
    "a lost base": ("DELETE FROM base", Registry.recipes),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_rows_damaged_by_hand_are_sentences(full: Registry, damage: str) -> None:
    statement, read = DAMAGE[damage]
    with closing(sqlite3.connect(full.folder / "registry.db")) as database, database:
        database.execute(statement)
    with pytest.raises(OverpaintError, match=r"database is damaged: .* run `overpaint verify`"):
        read(full)
    assert row_problems(full)


LOST_TEXTS: dict[str, tuple[str, str]] = {
    "the text of a patch": ("DELETE FROM patch_text WHERE id = 3", "apple"),
    "the texts of all patches": ("DELETE FROM patch_text", "apple"),
    "another text": ("UPDATE patch_text SET text = 'pear' WHERE id = 3", "apple"),
    "the name of a recipe": ("DELETE FROM recipe_text WHERE revision = 0", "recipe 'r'"),
    "a reason": ("DELETE FROM recipe_text WHERE revision = 2", "revision 2 of recipe 'r'"),
    "a reason that nobody gave": (
        "UPDATE recipe_text SET text = 'because' WHERE revision = 2",
        "revision 2 of recipe 'r'",
    ),
    "a reason of no revision": (
        "INSERT INTO recipe_text (recipe_id, revision, text) SELECT id, 99, 'because' FROM recipe",
        "revision 99, which does not exist",
    ),
    "an index of pieces that misses a text": ("DELETE FROM patch_pieces_docsize WHERE id = 3", "apple"),
}


@pytest.mark.parametrize("lost", LOST_TEXTS)
def test_what_searches_do_not_find_is_reported_and_written_anew(
    full: Registry, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "PAGE", 10)
    statement, named = LOST_TEXTS[lost]
    before = full.search("apple", limit=None)
    with closing(sqlite3.connect(full.folder / "registry.db")) as database, database:
        database.execute(statement)
    (problem,) = row_problems(full)
    assert re.fullmatch(r"the search texts of .* are out of date; run `overpaint db reindex`", problem)
    assert named in problem
    assert full.reindex() == (42 if lost == "the texts of all patches" else 1)
    assert row_problems(full) == []
    after = full.search("apple", limit=None)
    wanted = [each.id for each in before.patches]
    if lost == "the text of a patch":  # as if it were new
        (again,) = set(wanted) - {each.id for each in after.patches[1:]}
        wanted = [again, *(each for each in wanted if each != again)]
    assert [each.id for each in after.patches] == wanted
    assert after.recipes == before.recipes
    assert full.reindex() == 0


def test_a_text_of_other_pieces_is_found_again_after_reindexing(
    full: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "RECENT", 0)
    before = full.search("apple", limit=None)
    with closing(sqlite3.connect(full.folder / "registry.db")) as database, database:
        database.execute("INSERT INTO patch_pieces (patch_pieces) VALUES ('delete-all')")
    assert len(full.search("apple", limit=None).patches) < len(before.patches)
    full.reindex()
    assert full.search("apple", limit=None) == before


def test_lost_texts_are_reported_beside_what_cannot_be_mended(full: Registry) -> None:
    with closing(sqlite3.connect(full.folder / "registry.db")) as database, database:
        database.execute("UPDATE recipe SET revision = revision + 2")
        database.execute("DELETE FROM patch_text WHERE id = 3")
    assert any("its history has" in problem for problem in row_problems(full))
    assert any("`overpaint db reindex`" in problem for problem in row_problems(full))


def test_text_that_is_no_text_is_a_sentence_everywhere(full: Registry) -> None:
    with closing(sqlite3.connect(full.folder / "registry.db")) as database, database:
        database.execute("UPDATE concept SET name = CAST(x'ff' AS TEXT)")
    for read in (Registry.concepts, Registry.patches, lambda each: each.log("r"), lambda each: each.concept("plum")):
        with pytest.raises(OverpaintError, match=r"is damaged \(Could not decode to UTF-8 column 'name"):
            read(full)
    assert [problem.part for problem in verify(full).problems] == ["database"]


def test_a_change_that_a_lost_row_forbids_is_a_sentence(full: Registry) -> None:
    with closing(sqlite3.connect(full.folder / "registry.db")) as database, database:
        database.execute("DELETE FROM patch")
    with pytest.raises(OverpaintError, match="is damaged"):
        full.copy_recipe("r", "copy", why="", who="tester")
