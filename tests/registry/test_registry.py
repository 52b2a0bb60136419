"""What the registry remembers, and how it answers to what it does not know."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from overpaint.core.concepts import Concept
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.registry import Registry, models
from overpaint.registry.database import database_at
from overpaint.registry.store import BlobMissing

from .contents import add_patch, digest_of, lay


@pytest.fixture
def registry(either: Registry) -> Registry:
    """Everything here holds on SQLite and on PostgreSQL."""
    return either


ODD_NAMES = [
    "Robert'); DROP TABLE concept;--",
    'a "quoted" name',
    "100% _wild_ \\ cards",
    "two  spaces",
    "❤️ and 👩🏽‍🚀",
    "می‌خواهم",
    "क्‍ष",
    "草間　彌生",
    "草間彌生",
    "🍎‍🟩",
    "x" * 400,
    "../../etc/passwd",
]


def test_names_are_free_text(registry: Registry) -> None:
    for count, name in enumerate(ODD_NAMES, 1):
        concept = Concept(name, kind="person", synonyms=(f"so-called {name[:300]}",), anchor="someone")
        registry.add_concept(concept)
        registry.add_base(name, Path("/models/x"), "sd1", "0")
        registry.create_recipe(name, name)
        patch = add_patch(registry, name, concept=name, base=name, solver=name)
        lay(registry, name, patch.id, 1.0, why=name)
        registry.tag(f"t {name[:300]}", patches=[patch.id], recipes=[name], who=name)
        assert registry.concept(name) == concept
        assert registry.base(name).name == registry.recipe(name).base == name
        assert registry.patch(name).concept == registry.log(name)[0].why == name
        assert [each.id for each in registry.patches(base=name, solver=name)] == [patch.id]
        assert [each.id for each in registry.search(name, base=name).patches] == [patch.id]
        assert len(registry.concepts()) == len(registry.recipes()) + 1 == count + 1


UNPRINTABLE = ["a\x00b", "\x1b[31mred", "\udcff", "caf\udce9", "a\u2028b", "x" * 1_000_000, "e\u0301" * 500_000]
BAD_NAMES = ["", "   ", "a\nb", "x" * 401, *UNPRINTABLE]

ENTRANCES: dict[str, Callable[[Registry, str], object]] = {
    "base": lambda registry, text: registry.add_base(text, Path("/x"), "sd1", "0"),
    "layout": lambda registry, text: registry.add_base("b", Path("/x"), text, "0"),
    "fingerprint": lambda registry, text: registry.add_base("b", Path("/x"), "sd1", text),
    "concept": lambda registry, text: registry.add_concept(Concept(text)),
    "solver": lambda registry, text: add_patch(registry, "y", solver=text),
    "kind of patch": lambda registry, text: add_patch(registry, "y", kind=text),
    "id": lambda registry, text: add_patch(registry, "y", id=text),
    "patch's concept": lambda registry, text: add_patch(registry, "y", concept=text),
    "patch's base": lambda registry, text: add_patch(registry, "y", base=text),
    "recipe": lambda registry, text: registry.create_recipe(text, "small"),
    "recipe's base": lambda registry, text: registry.create_recipe("q", text),
    "ensured recipe": lambda registry, text: registry.create_recipe(text, "small", exist_ok=True),
    "copy": lambda registry, text: registry.copy_recipe("r", text, why="", who=""),
    "copied": lambda registry, text: registry.copy_recipe(text, "q", why="", who=""),
    "deleted": lambda registry, text: registry.delete_recipe(text, why="", who=""),
    "undeleted": lambda registry, text: registry.undelete_recipe(text, why="", who=""),
    "changed recipe": lambda registry, text: lay(registry, text, digest_of("x"), 1.0),
    "laid patch": lambda registry, text: lay(registry, "r", text, 1.0),
    "log": lambda registry, text: registry.log(text),
    "log of deleted": lambda registry, text: registry.log(text, deleted=True),
    "diff": lambda registry, text: registry.diff("r", text),
    "revision": lambda registry, text: registry.recipe(f"r@{text}"),
    "found patch": lambda registry, text: registry.patch(text),
    "found recipe": lambda registry, text: registry.recipe(text),
    "found base": lambda registry, text: registry.base(text),
    "found concept": lambda registry, text: registry.concept(text),
    "patches of": lambda registry, text: registry.patches(concept=text),
    "patches for": lambda registry, text: registry.count_patches(base=text),
    "patches by": lambda registry, text: registry.patches(solver=text),
    "patches with": lambda registry, text: registry.patches(tag=text),
    "tag": lambda registry, text: registry.tag(text, recipes=["r"], who=""),
    "tagged patch": lambda registry, text: registry.tag("t", patches=[text], who=""),
    "untagged recipe": lambda registry, text: registry.untag("t", recipes=[text]),
    "tags": lambda registry, text: registry.tags(text),
    "search": lambda registry, text: registry.search(text),
}
# Texts that may be empty or of several lines, or that are parts of a whole.
NOTES: dict[str, Callable[[Registry, str], object]] = {
    "source": lambda registry, text: registry.add_base("b", Path(text), "sd1", "0"),
    "synonym": lambda registry, text: registry.add_concept(Concept("c", synonyms=("word", text))),
    "anchor": lambda registry, text: registry.add_concept(Concept("c", anchor=text)),
    "why": lambda registry, text: lay(registry, "r", digest_of("x"), 1.0, why=text),
    "why of a copy": lambda registry, text: registry.copy_recipe("r", "q", why=text, who=""),
    "who deletes": lambda registry, text: registry.delete_recipe("r", why="", who=text),
    "who tags": lambda registry, text: registry.tag("t", recipes=["r"], who=text),
    "searched solver": lambda registry, text: registry.search(solver=text),
    "searched tag": lambda registry, text: registry.search(tag=text),
    "searched base": lambda registry, text: registry.search(base=text),
}


def test_names_that_do_not_print_or_do_not_end_are_refused_everywhere(registry: Registry, anywhere: str | Path) -> None:
    add_patch(registry, "x")
    registry.create_recipe("r", "small")
    before = _rows(anywhere)
    for entrances, texts in ((ENTRANCES, BAD_NAMES), (NOTES, UNPRINTABLE)):
        for entrance, enter in entrances.items():
            for text in texts:
                with pytest.raises(OverpaintError) as caught:
                    enter(registry, text)
                said = str(caught.value)
                assert len(said) < 2000, (entrance, text[:20])
                assert said.encode(), "a terminal can show it"
    assert _rows(anywhere) == before
    assert list(registry.blobs.digests()) == [registry.patch(digest_of("x")).blob]


def _rows(location: str | Path) -> dict[str, list[tuple[Any, ...]]]:
    with database_at(location).reading() as session:
        tables = models.Row.metadata.tables.values()
        return {table.name: [tuple(row) for row in session.execute(select(table))] for table in tables}


LOOK_ALIKES = {
    "blank before": " safe",
    "blank behind": "safe ",
    "no-break space": "safe\u00a0",
    "no-break space within": "safe\u00a0set",
    "zero-width space": "sa\u200bfe",
    "word joiner": "safe\u2060",
    "byte order mark": "\ufeffsafe",
    "joiner in a word": "sa\u200dfe",
    "non-joiner behind": "safe\u200c",
    "right to left": "safe\u202e",
    "isolate": "\u2066safe\u2069",
    "soft hyphen": "sa\u00adfe",
    "tag": "safe\U000e0061",
    "variation selector": "safe\ufe0f",
    "another selector": "safe\U000e0100",
    "filler": "safe\u3164",
    "grapheme joiner": "sa\u034ffe",
    "braille blank": "safe\u2800",
}


@pytest.mark.parametrize("name", LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_no_second_name_looks_like_the_first(name: str, registry: Registry) -> None:
    registry.create_recipe("safe", "small")
    patch = add_patch(registry, "x")
    new: list[Callable[[], object]] = [
        lambda: registry.create_recipe(name, "small"),
        lambda: registry.create_recipe(name, "small", exist_ok=True),
        lambda: registry.copy_recipe("safe", name, why="", who=""),
        lambda: registry.merge_history(name, "small", (), (), models.now()),
        lambda: registry.add_base(name, Path("/x"), "sd1", "0"),
        lambda: registry.add_concept(Concept(name)),
        lambda: registry.learn_concepts([Concept("c", synonyms=(name,))]),
        lambda: registry.tag(name, patches=[patch.id], who=""),
    ]
    for act in new:
        with pytest.raises(OverpaintError, match=r"nobody sees|neither begins nor ends with a blank"):
            act()
    assert [recipe.name for recipe in registry.recipes()] == ["safe"]


@pytest.mark.parametrize("name", ["  spaces  ", "zero\u200bwidth"])
def test_names_of_an_older_version_go_on_working(name: str, registry: Registry) -> None:
    registry.create_recipe("r", "small")
    patch = add_patch(registry, "x")
    with registry._database.writing() as session:
        session.execute(update(models.RecipeRow).values(name=name))
        session.execute(update(models.ConceptRow).values(name=name, definition=json.dumps(Concept(name).as_json())))
        session.execute(update(models.BaseRow).values(name=name))
        session.add(models.PatchTagRow(patch_id=patch.id, tag=name, who=""))
    assert registry.patch(name).id == patch.id
    lay(registry, name, patch.id, 1.0)
    assert registry.patches(base=name, tag=name) == registry.patches(concept=name) == [registry.patch(patch.id)]
    registry.add_concept(Concept(name), exist_ok=True)
    registry.create_recipe(name, name, exist_ok=True)
    record = registry.history(name)
    assert registry.merge_history(name, name, record.revisions, record.tags, record.created_at) == "the same"
    registry.untag(name, patches=[patch.id])
    registry.delete_recipe(name, why="", who="")
    registry.undelete_recipe(name, why="", who="")


def test_two_encodings_of_one_letter_are_one_name(registry: Registry) -> None:
    registry.add_concept(Concept("caf\u00e9"))
    assert registry.concept("cafe\u0301") == Concept("caf\u00e9")
    with pytest.raises(AlreadyExists):
        registry.add_concept(Concept("cafe\u0301"))


def test_unknown_names_get_the_nearest_known(registry: Registry) -> None:
    with pytest.raises(NotFound, match="did you mean 'apple'"):
        registry.concept("Aple")
    with pytest.raises(NotFound, match="did you mean 'small'"):
        registry.create_recipe("r", "smal")
    with pytest.raises(NotFound, match="there is 'small'"):
        registry.base("zzz")
    with pytest.raises(NotFound, match="no recipe yet"):
        registry.log("r")


def test_a_name_like_no_other_gets_each_known_one_once(registry: Registry) -> None:
    registry.add_concept(Concept("dog"))
    with pytest.raises(NotFound, match=r"no concept answers to 'xyz'; there is 'apple', 'dog'$"):
        registry.concept("xyz")


@pytest.mark.parametrize("name", [5, None, b"cat"])
def test_a_name_that_is_no_text_is_refused(registry: Registry, name: Any) -> None:
    with pytest.raises(OverpaintError, match=r"the name of a concept is a text; got"):
        registry.concept(name)


def test_a_taken_name_is_refused(registry: Registry) -> None:
    with pytest.raises(AlreadyExists, match="'small' is there already"):
        registry.add_base("small", Path("/elsewhere"), "sd2", "0")
    with pytest.raises(AlreadyExists, match="'apple' is there already"):
        registry.add_concept(Concept("apple", anchor="pear"))
    registry.create_recipe("r", "small")
    with pytest.raises(AlreadyExists, match="'r' is there already"):
        registry.create_recipe("r", "small")


def test_ensuring_is_a_no_op_only_for_equals(registry: Registry) -> None:
    registry.add_concept(Concept("apple", anchor="pear"), exist_ok=True)
    registry.add_concept(Concept("pear"), exist_ok=True)
    assert [concept.name for concept in registry.concepts()] == ["apple", "pear"]
    with pytest.raises(AlreadyExists, match="pear"):
        registry.add_concept(Concept("apple", anchor="plum"), exist_ok=True)
    registry.add_base("large", Path("/models/large"), "sdxl", "e")
    assert registry.create_recipe("r", "small", exist_ok=True) == registry.create_recipe("r", "small", exist_ok=True)
    with pytest.raises(AlreadyExists, match=r"'small' and not on 'large'"):
        registry.create_recipe("r", "large", exist_ok=True)


def test_a_patch_comes_back_as_it_was(registry: Registry, anywhere: str | Path) -> None:
    patch = add_patch(registry, "one")
    again = Registry.open(anywhere)
    assert again.patches() == [patch]
    assert again.blob(patch) == b"one"
    assert (patch.nbytes, patch.blob) == (3, hashlib.sha256(b"one").hexdigest())
    assert (patch.settings, patch.seed, patch.concept, patch.base) == ({"lambda": 0.1}, 7, "apple", "small")
    assert patch.solved_at.utcoffset() == timedelta(0)
    assert isinstance(hash(patch), int)


def test_adding_a_patch_again_changes_nothing_but_heals_its_bytes(registry: Registry) -> None:
    patch = add_patch(registry, "one")
    for lost in (registry.folder / "blobs").rglob(patch.blob):
        lost.unlink()
    with pytest.raises(BlobMissing, match=patch.blob):
        registry.blob(patch)
    assert add_patch(registry, "one") == patch
    assert registry.blob(patch) == b"one"
    assert registry.patches() == [patch]


def test_a_patch_answers_to_its_id_to_its_beginning_and_to_its_concept(registry: Registry) -> None:
    add_patch(registry, "old")
    patch = add_patch(registry, "new")
    assert registry.patch(patch.id) == registry.patch(patch.id[:4].upper()) == registry.patch("apple") == patch
    with pytest.raises(NotFound):
        registry.patch(patch.id[:3])
    with pytest.raises(NotFound, match="did you mean 'apple'"):
        registry.patch("appel")
    registry.add_concept(Concept("pear"))
    with pytest.raises(NotFound, match="has no patch yet"):
        registry.patch("pear")


def test_an_ambiguous_beginning_lists_what_it_begins(registry: Registry) -> None:
    ids = [digit * 64 for digit in "ab"] + ["face" + digit * 60 for digit in "01"]
    for id in ids:
        registry.add_patch(
            id=id, blob=b"", concept="apple", base="small", solver="s", kind="k", settings={}, seed=0, seconds=0
        )
    with pytest.raises(OverpaintError, match=f"more than one(?s:.*){ids[2]}(?s:.*){ids[3]}") as caught:
        registry.patch("face")
    assert ids[0] not in str(caught.value)
    assert registry.patch("face0").id == ids[2]


def test_a_concept_goes_before_an_id_that_begins_with_its_name(registry: Registry) -> None:
    for id in ("face" + "0" * 60, "b" * 64):
        concept = "apple" if id.startswith("face") else "face"
        registry.add_concept(Concept(concept, anchor="pear"), exist_ok=True)
        registry.add_patch(
            id=id, blob=b"", concept=concept, base="small", solver="s", kind="k", settings={}, seed=0, seconds=0
        )
    assert registry.patch("face").id == "b" * 64


def test_patches_are_listed_by_concept_and_base(registry: Registry) -> None:
    registry.add_base("large", Path("/models/large"), "sdxl", "e")
    registry.add_concept(Concept("pear"))
    one, two, three = (
        add_patch(registry, "1"),
        add_patch(registry, "2", concept="pear"),
        add_patch(registry, "3", base="large"),
    )
    assert registry.patches() == [one, two, three]
    assert registry.patches(concept="apple") == [one, three]
    assert registry.patches(concept="apple", base="large") == [three]
    with pytest.raises(NotFound):
        registry.patches(base="huge")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"id": "xyz"}, "64 lower-case"),
        ({"concept": "plum"}, "no concept"),
        ({"base": "huge"}, "no base"),
        ({"seed": 2**63}, "63 bits"),
        ({"seconds": float("nan")}, "finite"),
        ({"settings": {"path": Path("/")}}, "JSON"),
        ({"settings": {"rate": float("inf")}}, "JSON"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_any_byte_is_written(
    registry: Registry, wrong: dict[str, object], sentence: str
) -> None:
    right = {"id": digest_of("x"), "blob": b"x", "concept": "apple", "base": "small", "solver": "s", "kind": "k"}
    with pytest.raises(OverpaintError, match=sentence):
        registry.add_patch(**{**right, "settings": {}, "seed": 0, "seconds": 0.0, **wrong})  # type: ignore[arg-type]
    assert list(registry.blobs.digests()) == []
