"""Lists come in pages, and a page of a large registry costs no more than one of a small: it is read by an index."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import Engine, event, insert

from overpaint.core.errors import NotFound
from overpaint.registry import Registry, models, queries
from overpaint.registry.schema import connect

from .contents import add_patch, digest_of, lay, stock


def test_a_page_is_the_part_of_the_list_that_was_asked_for(either: Registry) -> None:
    oldest_first = [add_patch(either, str(number)) for number in range(5)]
    assert either.patches() == oldest_first
    assert either.patches(newest_first=True) == oldest_first[::-1]
    assert either.patches(limit=2, offset=1) == oldest_first[1:3]
    assert either.patches(limit=2, offset=4, newest_first=True) == oldest_first[:1]
    assert either.patches(limit=9, offset=9) == []
    assert either.count_patches() == either.count_patches(base="small", solver="uce") == 5
    assert either.count_patches(solver="esd") == 0
    assert [concept.name for concept in either.concepts(limit=1)] == ["apple"]
    assert either.concepts(limit=1, offset=1) == []


def test_patches_solved_at_one_moment_have_an_order(either: Registry) -> None:
    ids = sorted(add_patch(either, str(number)).id for number in range(4))
    with either._database.writing() as session:
        for row in session.query(models.PatchRow):
            row.solved_at = datetime(2026, 1, 1, tzinfo=timezone.utc)
    assert [patch.id for patch in either.patches()] == ids
    pages = [either.patches(limit=1, offset=number, newest_first=True)[0].id for number in range(4)]
    assert pages == ids[::-1]


DEFINITION = '{"name": "thing"}'


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Some thousand patches of a thousand concepts: enough that SQLite would rather read an index than everything."""
    folder = tmp_path_factory.mktemp("large")
    registry = stock(Registry.open(folder))
    start = datetime(2026, 1, 1, tzinfo=timezone.utc)
    with connect(folder, create=False).writing() as session:
        concepts = [
            {"id": number, "name": f"thing {number}", "kind": "object", "definition": DEFINITION}
            for number in range(2, 1002)
        ]
        session.execute(insert(models.ConceptRow), concepts)
        same = {"base_id": 1, "solver": "uce", "kind": "k", "settings": "{}", "seed": 0, "nbytes": 1, "seconds": 1.0}
        patches: list[dict[str, Any]] = [
            {
                **same,
                "id": digest_of(str(number)),
                "blob": digest_of(str(number)),
                "concept_id": 2 + number % 1000,
                "solved_at": start + timedelta(seconds=number),
            }
            for number in range(4000)
        ]
        session.execute(insert(models.PatchRow), patches)
        session.execute(
            insert(models.PatchTextRow),
            [{"patch_id": row["id"], "text": f"\n{row['concept_id']}\n"} for row in patches],
        )
    registry.create_recipe("r", "small")
    lay(registry, "r", patches[7]["id"], 1.0)
    registry.copy_recipe("r", "s", why="because", who="tester")
    return registry


FIRST_ROWS = re.compile(r"ORDER BY concept\.id\s+LIMIT")


@contextmanager
def plans() -> Iterator[list[list[str]]]:
    """How SQLite goes about every query of the block, step by step; those that stop after some first rows left out."""
    found: list[list[str]] = []

    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *rest: Any) -> None:
        if statement.startswith("SELECT") and not FIRST_ROWS.search(statement):
            rows = connection.connection.driver_connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
            found.append([row[3] for row in rows])

    event.listen(Engine, "before_cursor_execute", explain)
    try:
        yield found
    finally:
        event.remove(Engine, "before_cursor_execute", explain)


def _miss(look: Callable[[], object]) -> None:
    with pytest.raises(NotFound):
        look()


LOOKS: dict[str, Callable[[Registry], object]] = {
    "first page": lambda registry: registry.patches(limit=50, newest_first=True),
    "a later page": lambda registry: registry.patches(limit=50, offset=500),
    "page of a concept": lambda registry: registry.patches(concept="thing 77", limit=50, newest_first=True),
    "page of a base": lambda registry: registry.patches(base="small", limit=50, newest_first=True),
    "page of a solver": lambda registry: registry.patches(solver="uce", limit=50, newest_first=True),
    "by id": lambda registry: registry.patch(digest_of("77")),
    "by beginning": lambda registry: registry.patch(digest_of("77")[:12]),
    "by concept": lambda registry: registry.patch("thing 77"),
    "by nothing": lambda registry: _miss(lambda: registry.patch("thong 77")),
    "a recipe": lambda registry: registry.recipe("r"),
    "an earlier revision": lambda registry: registry.recipe("r@0"),
    "all recipes": lambda registry: registry.recipes(),
    "what lies on a recipe": lambda registry: (registry.patches_on("r"), registry.patches_on("r@1")),
    "a history": lambda registry: (registry.log("r"), registry.history("r")),
    "a comparison": lambda registry: registry.diff("r@0", "s"),
    "recipes with a patch": lambda registry: registry.recipes_with(digest_of("7")),
    "due": lambda registry: registry.due(datetime(2030, 1, 1).date()),
    "adding": lambda registry: add_patch(registry, "another", concept="thing 77"),
    "laying": lambda registry: lay(registry, "r", digest_of("78"), 1.0),
}


@pytest.mark.parametrize("look", LOOKS)
def test_no_table_that_grows_is_read_to_its_end_or_sorted(large: Registry, look: str) -> None:
    with plans() as found:
        LOOKS[look](large)
    assert found
    for steps in found:
        # A few rows that were looked up may be sorted, such as the tags of a page; a list may not.
        lists = LIST.match(steps[0])
        for step in steps:
            assert not WHOLE.match(step), steps
            assert not (lists and "TEMP B-TREE" in step), steps


LIST = re.compile(r"(SCAN|SEARCH) patch USING (COVERING )?INDEX ix_patch_")
WHOLE = re.compile(r"SCAN (patch|concept|patch_text|recipe_patch|revision|revision_patch)$")


def test_the_first_page_is_the_beginning_of_an_index(large: Registry) -> None:
    """So that the test above would see a list that is not."""
    with plans() as found:
        large.patches(limit=50, newest_first=True)
        large.patches(concept="thing 77", limit=50)
    lists = [step for steps in found for step in steps if LIST.match(step)]
    assert lists == [
        "SCAN patch USING COVERING INDEX ix_patch_solved_at_id",
        "SEARCH patch USING COVERING INDEX ix_patch_concept_id_solved_at_id (concept_id=?)",
    ]


def test_a_search_compares_the_newest_texts_and_looks_up_the_rest(
    large: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "RECENT", 10)
    with plans() as found:
        large.search("nowhere", solver="uce", base="small")
    recent, rest = (steps for steps in found if steps[0].startswith("SEARCH patch_text USING"))
    assert recent == ["SEARCH patch_text USING INTEGER PRIMARY KEY (rowid>?)"]
    assert rest[0] == "SEARCH patch_text USING INTEGER PRIMARY KEY (rowid=?)"
    assert rest[-1].startswith("SCAN patch_pieces VIRTUAL TABLE INDEX")


def test_what_a_name_is_compared_with_does_not_grow(large: Registry) -> None:
    with pytest.raises(NotFound, match="did you mean 'thing 977'"):
        large.concept("thing 977 ")
    with pytest.raises(NotFound, match="did you mean"):
        large.patch("Thing 97")
