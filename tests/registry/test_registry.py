"""What the registry remembers, and how it answers to what it does not know."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from pathlib import Path

import pytest

from overpaint.concepts import Concept
from overpaint.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.registry import Registry
from overpaint.registry.store import BlobMissing

from .shelf import add_patch, digest_of, lay

ODD_NAMES = [
    "Robert'); DROP TABLE concept;--",
    'a "quoted" name',
    "100% _wild_ \\ cards",
    "  spaces  ",
    "草間彌生",
    "🍎‍🟩",
    "x" * 400,
    "../../etc/passwd",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_are_free_text(registry: Registry, name: str) -> None:
    concept = Concept(name, kind="person", synonyms=("so; called",), anchor="someone")
    registry.add_concept(concept)
    registry.add_base(name, Path("/models/x"), "sd1", "0")
    registry.create_recipe(name, name)
    lay(registry, name, add_patch(registry, "odd", concept=name, base=name).id, 1.0, why=name)
    assert registry.concept(name) == concept
    assert registry.base(name).name == registry.recipe(name).base == name
    assert registry.patch(name).concept == registry.log(name)[0].why == name
    assert len(registry.concepts()) == 2


@pytest.mark.parametrize("name", ["", "   ", "a\x00b", "a\nb", "\x1b[31mred", "\udcff", "a\u2028b", "x" * 401])
def test_names_that_do_not_print_or_do_not_end_are_refused(registry: Registry, name: str) -> None:
    for attempt in (
        lambda: registry.add_base(name, Path("/x"), "sd1", "0"),
        lambda: registry.create_recipe(name, "small"),
        lambda: registry.add_concept(Concept(name)),
        lambda: registry.patch(name),
        lambda: registry.recipe(name),
    ):
        with pytest.raises(OverpaintError):
            attempt()
    assert len(registry.bases()) == len(registry.concepts()) == 1


def test_two_spellings_of_one_letter_are_one_name(registry: Registry) -> None:
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


def test_a_taken_name_is_refused(registry: Registry) -> None:
    with pytest.raises(AlreadyExists, match="'small' is there already"):
        registry.add_base("small", Path("/elsewhere"), "sd2", "0")
    with pytest.raises(AlreadyExists, match="'apple' is there already"):
        registry.add_concept(Concept("apple", anchor="pear"))
    registry.create_recipe("r", "small")
    with pytest.raises(AlreadyExists, match="'r' is there already"):
        registry.create_recipe("r", "small")


def test_ensuring_is_a_no_op_only_for_equals(registry: Registry) -> None:
    registry.ensure_concept(Concept("apple", anchor="pear"))
    registry.ensure_concept(Concept("pear"))
    assert [concept.name for concept in registry.concepts()] == ["apple", "pear"]
    with pytest.raises(AlreadyExists, match="pear"):
        registry.ensure_concept(Concept("apple", anchor="plum"))
    registry.add_base("large", Path("/models/large"), "sdxl", "e")
    assert registry.ensure_recipe("r", "small") == registry.ensure_recipe("r", "small")
    with pytest.raises(AlreadyExists, match=r"'small' and not on 'large'"):
        registry.ensure_recipe("r", "large")


def test_a_patch_comes_back_as_it_was(registry: Registry, folder: Path) -> None:
    patch = add_patch(registry, "one")
    again = Registry.open(folder)
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
        registry.ensure_concept(Concept(concept, anchor="pear"))
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
def test_what_cannot_be_kept_is_refused_before_any_byte_is_written(
    registry: Registry, wrong: dict[str, object], sentence: str
) -> None:
    right = {"id": digest_of("x"), "blob": b"x", "concept": "apple", "base": "small", "solver": "s", "kind": "k"}
    with pytest.raises(OverpaintError, match=sentence):
        registry.add_patch(**{**right, "settings": {}, "seed": 0, "seconds": 0.0, **wrong})  # type: ignore[arg-type]
    assert list(registry.blobs.digests()) == []
