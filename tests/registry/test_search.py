"""Finding patches and recipes by what is written anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Engine, event
from sqlalchemy import text as sql

from overpaint.core.concepts import Concept
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.registry import Registry, queries
from overpaint.registry import registry as registry_module
from overpaint.registry.schema import connect
from overpaint.registry.upkeep import row_problems

from .contents import add_patch, lay, stock


@pytest.fixture
def registry(either: Registry) -> Registry:
    """On SQLite and on PostgreSQL: patches of an apple, a style and a person, and two recipes."""
    either.add_base("large", Path("/models/large"), "sdxl", "e" * 8)
    either.add_concept(Concept("Straßenkunst 100%", "style", ("Banksy", "street_art"), "poster"))
    either.add_concept(Concept("草間彌生", "person", ("Kusama Yayoi",)))
    add_patch(either, "apple")
    add_patch(either, "style", concept="Straßenkunst 100%", base="large")
    add_patch(either, "person", concept="草間彌生")
    either.create_recipe("Für Ärzte", "small")
    either.create_recipe("safe", "large")
    lay(either, "Für Ärzte", either.patch("apple").id, 1.0, why="Takedown of Monday\nby letter")
    return either


PATCHES = {
    "apple": ["apple"],
    "APPL": ["apple"],
    "pear": ["apple"],
    "banksy": ["Straßenkunst 100%"],
    "STRASSENKUNST": ["Straßenkunst 100%"],
    "kunst style": ["Straßenkunst 100%"],
    "poster large": ["Straßenkunst 100%"],
    "彌生": ["草間彌生"],
    "yayoi kusama": ["草間彌生"],
    "ｋｕｓａｍａ": ["草間彌生"],
    "uce": ["草間彌生", "Straßenkunst 100%", "apple"],
    "map": ["草間彌生", "Straßenkunst 100%", "apple"],
    "100%": ["Straßenkunst 100%"],
    "street_art": ["Straßenkunst 100%"],
    "%": ["Straßenkunst 100%"],
    "_": ["Straßenkunst 100%"],
    "streetXart": [],
    "1%0": [],
    "apple banksy": [],
    "/": [],
    "\\": [],
    "'; DROP TABLE patch; --": [],
    "nobody": [],
}
RECIPES = {
    "ärzte": ["Für Ärzte"],
    "takedown": ["Für Ärzte"],
    "MONDAY letter": ["Für Ärzte"],
    "small": ["Für Ärzte"],
    "large": ["safe"],
    "e": ["safe", "Für Ärzte"],
    "für safe": [],
    "apple": [],
}


def test_every_word_is_looked_for_everywhere(registry: Registry) -> None:
    assert {text: [patch.concept for patch in registry.search(text).patches] for text in PATCHES} == PATCHES


def test_the_index_finds_what_comparing_every_text_finds(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.tag('a "quoted" tag', patches=["apple"], who="")
    registry.tag("gone", patches=["草間彌生"], who="")
    registry.untag("gone", patches=["草間彌生"])
    searches = [
        *PATCHES,
        '"quoted"',
        'ed" tag',
        "gone",
        "obj uce",
        "ject sma apple",
        "彌生 uce",
        "small",
        "' OR 1",
        '""',
    ]
    filters: list[dict[str, str]] = [
        {},
        {"kind": "style"},
        {"solver": "uce"},
        {"base": "small", "tag": 'a "quoted" tag'},
    ]
    pages: list[dict[str, int | None]] = [{"limit": None}, {"limit": 1, "offset": 1}]

    def answers() -> list[list[str]]:
        asked = [
            (text, where, page) for text in [*searches, ""] for where in filters for page in pages if text or where
        ]
        return [[patch.id for patch in registry.search(text, **where, **page).patches] for text, where, page in asked]  # type: ignore[arg-type]

    indexed = {}
    for recent in (0, 1, 1000):
        monkeypatch.setattr(queries, "RECENT", recent)
        indexed[recent] = answers()
    monkeypatch.setattr(queries, "_has_pieces", lambda session: False)
    assert list(indexed.values()) == [answers()] * 3


def test_a_removed_patch_is_no_longer_found(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "RECENT", 0)
    assert registry.search("banksy").patches
    registry.remove_patch("Straßenkunst 100%")
    assert not registry.search("banksy").patches


def test_without_full_text_search_a_registry_is_made_and_searched_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqlite3.sqlite_version_info", (3, 33, 0))
    registry = stock(Registry.open(folder))
    add_patch(registry, "one")
    monkeypatch.setattr(queries, "RECENT", 0)
    assert registry.search("apple").patches


def test_recipes_are_found_by_name_base_and_reasons(registry: Registry) -> None:
    assert {text: [recipe.name for recipe in registry.search(text).recipes] for text in RECIPES} == RECIPES


def test_filters_are_exact_and_go_together(registry: Registry) -> None:
    def concepts(text: str = "", **where: str) -> list[str]:
        return [patch.concept for patch in registry.search(text, **where).patches]  # type: ignore[arg-type]

    assert concepts(kind="style") == ["Straßenkunst 100%"]
    assert concepts(kind="sty") == []
    assert concepts(solver="uce", base="small") == ["草間彌生", "apple"]
    assert concepts(solver="uc") == concepts(solver="u_e") == concepts(solver="%") == []
    assert concepts("kusama", kind="person", base="small", solver="uce") == ["草間彌生"]
    assert concepts("kusama", kind="style") == []
    with pytest.raises(NotFound, match="did you mean 'small'"):
        registry.search(base="smal")


def test_tags_are_found_as_words_and_as_filters(registry: Registry) -> None:
    registry.tag("safe-2026-11", patches=["apple"], recipes=["Für Ärzte"], who="")
    for found in (registry.search("2026-11"), registry.search(tag="SAFE-2026-11"), registry.search(tag="safe-2026-11")):
        assert [patch.concept for patch in found.patches] == ["apple"]
        assert [recipe.name for recipe in found.recipes] == ["Für Ärzte"]
    found = registry.search(tag="safe-2026")
    assert not found.patches
    assert not found.recipes
    assert registry.search("pear", tag="safe-2026-11").patches
    assert not registry.search("banksy", tag="safe-2026-11").patches


def test_a_recipe_has_no_kind_and_no_solver(registry: Registry) -> None:
    assert registry.search("ärzte").recipes
    assert registry.search("ärzte", kind="object").recipes == registry.search("ärzte", solver="uce").recipes == ()


def test_results_come_in_pages_the_newest_first(registry: Registry) -> None:
    everything = registry.search("uce").patches
    assert everything == tuple(reversed(registry.patches()))
    assert registry.search("uce", limit=2).patches == everything[:2]
    assert registry.search("uce", limit=2, offset=2).patches == everything[2:]
    assert registry.search("uce", limit=None, offset=1).patches == everything[1:]


def test_a_deleted_recipe_is_not_found(registry: Registry) -> None:
    registry.delete_recipe("Für Ärzte", why="monday", who="")
    assert registry.search("monday").recipes == ()


def test_searching_for_nothing_is_refused(registry: Registry) -> None:
    for nothing in ("", "  \t"):
        with pytest.raises(OverpaintError, match="say what to search for"):
            registry.search(nothing)


def test_a_search_that_cannot_be_is_refused(registry: Registry) -> None:
    for text in ("a\x1fb", "\udcff", "x" * 401, "x " * 500_000):
        for where in ({"text": text}, {"tag": text}, {"solver": text}):
            with pytest.raises(OverpaintError):
                registry.search(**where)  # type: ignore[arg-type]


def test_as_many_as_a_database_can_count_may_be_asked_for(registry: Registry) -> None:
    assert registry.search("apple", limit=2**63 - 1, offset=1).patches == ()


def test_recipes_that_are_found_are_read_together(registry: Registry) -> None:
    for number in range(8):
        registry.create_recipe(f"found {number}", "small")
    asked: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        asked.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        assert len(registry.search("found").recipes) == 8
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert sum("recipe_tag" in statement for statement in asked) == 1


def test_a_damaged_index_is_one_sentence(folder: Path) -> None:
    registry = stock(Registry.open(folder))
    with connect(folder, create=False).writing() as session:
        session.execute(sql("DELETE FROM patch_pieces_data"))
    with pytest.raises(OverpaintError, match="is damaged"):
        registry.search("quagga")


def test_texts_that_were_lost_or_altered_are_written_anew(
    registry: Registry, anywhere: str | Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page by page, on either database; what was lost is found first from then on."""
    monkeypatch.setattr(registry_module, "PAGE", 1)
    assert row_problems(registry) == []
    with connect(anywhere, create=False).writing() as session:
        session.execute(sql("DELETE FROM patch_text WHERE text LIKE '%apple%'"))
        session.execute(sql("UPDATE patch_text SET text = 'nothing' WHERE text LIKE '%banksy%'"))
        session.execute(sql("DELETE FROM recipe_text WHERE revision = 0"))
    (problem,) = row_problems(registry)
    assert "and 1 more are out of date; run `overpaint db reindex`" in problem
    assert registry.reindex() == 4
    assert row_problems(registry) == []
    assert [each.concept for each in registry.search("uce").patches] == ["apple", "草間彌生", "Straßenkunst 100%"]
    assert [each.name for each in registry.search("ärzte").recipes] == ["Für Ärzte"]
    assert registry.reindex() == 0
