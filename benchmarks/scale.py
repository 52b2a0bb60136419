"""What a registry of a million patches costs: `python -m benchmarks.scale`, with `--url` on PostgreSQL.

The rows are made within the database, by SQL, so that filling takes a minute or two; there are no bytes of patches behind them.
Then everything that a list, a search, a page or an addition asks is asked, and timed: milliseconds of this process' CPU, which
on SQLite are the database's too, and by the clock. On PostgreSQL (`--url postgresql://HOST/EMPTY_DATABASE?blobs=FOLDER`)
only the latter count.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.orm import Session

from benchmarks import tables
from overpaint.core.concepts import Concept
from overpaint.core.errors import NotFound
from overpaint.registry import Registry
from overpaint.registry.history import Note
from overpaint.registry.queries import BASE, KIND, SOLVER
from overpaint.registry.records import RecipeEntry
from overpaint.registry.schema import connect

PER_CONCEPT = 100
"""How many patches a concept has."""
RARE = "quagga"
"""Every thousandth concept is one."""
BAR = 100.0
"""Milliseconds that a call may take."""
LONG = 20
"""How many recipes have a long history."""


def main() -> None:
    parser = tables.arguments(__doc__ or "")
    parser.add_argument("--patches", type=int, default=1_000_000)
    parser.add_argument("--recipes", type=int, default=10_000)
    parser.add_argument("--revisions", type=int, default=1_000, help=f"that {LONG} of the recipes have")
    parser.add_argument("--rounds", type=int, default=5, help="how often each thing is asked; the fastest counts")
    parser.add_argument("--url", help="an empty database instead of a temporary folder")
    parser.add_argument("--folder", type=Path, help="where to make the registry, or one that was made before")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="overpaint-scale-") as temporary:
        location = chosen.url or chosen.folder or Path(temporary)
        registry = Registry.open(location)
        if not registry.bases():
            started = time.perf_counter()
            fill(location, registry, chosen.patches, chosen.recipes, chosen.revisions)
            print(f"filled in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        rows = [[name, *timed(call, chosen.rounds), BAR] for name, call in calls(registry).items()]
        title = f"{registry.count_patches():,} patches, {len(registry.recipe_names()):,} recipes"
        tables.save(chosen.json, tables.show(title, ["call", "CPU, ms", "clock, ms", "bar, ms"], rows))


def fill(location: str | Path, registry: Registry, patches: int, recipes: int, revisions: int) -> None:
    """Make the rows."""
    registry.add_base("small", Path("/models/small"), "sd1", "f" * 64)
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubcdfghlmnprst", k=draw.randint(4, 9))) for _ in range(2000)]
    concepts = max(1, patches // PER_CONCEPT)
    names = [
        f"{RARE if number % 1000 == 7 else draw.choice(words)} {draw.choice(words)} {number}"
        for number in range(concepts)
    ]
    registry.learn_concepts(Concept(name, synonyms=tuple(draw.choices(words, k=3)), anchor="thing") for name in names)
    database = connect(location, create=False)
    with database.writing() as session:
        sqlite = session.get_bind().dialect.name == "sqlite"
        _run(session, sqlite, PATCHES, n=patches, concepts=concepts)
        _run(session, sqlite, TEXTS, kind=KIND, solver=SOLVER, base=BASE)
        _run(session, sqlite, RECIPES, n=recipes)
        _run(session, sqlite, REVISIONS, n=revisions, of=LONG)
        _run(session, sqlite, "UPDATE recipe SET revision = :n WHERE id <= :of", n=revisions, of=LONG)
        _run(session, sqlite, CHANGES)
        _run(session, sqlite, ENTRIES)
        _run(session, sqlite, REASONS)
        session.execute(text("ANALYZE"))
    if not sqlite:
        # A server does so by itself within a minute of so many insertions; until then no index alone can answer.
        with database.writing() as session:
            engine = session.get_bind().engine
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM (ANALYZE)"))


# NUMBERS stands for a query of the numbers from 1 to :n, RANDOM_ID for 64 hexadecimal digits, DIGITS for six of a number, LINE
# for a line feed; each database has its own. A moment is a second and these digits.
PATCHES = """
    INSERT INTO patch (id, concept_id, base_id, solver, kind, settings, seed, nbytes, blob, seconds, solved_at)
    SELECT RANDOM_ID, 1 + number % :concepts, 1, CASE number % 3 WHEN 0 THEN 'uce' ELSE 'separable' END, 'text map',
           :settings, 0, 12000, RANDOM_ID, 0.5, (:second || DIGITS || :zone) FROM (NUMBERS) AS numbers
"""
TEXTS = """
    INSERT INTO patch_text (patch_id, text)
    SELECT patch.id, LINE || concept.name || LINE || 'thing' || LINE || 'object' || LINE || 'text map' || LINE || patch.solver
           || LINE || 'small' || LINE || :kind || 'object' || LINE || :solver || patch.solver || LINE || :base || '1' || LINE
    FROM patch JOIN concept ON concept.id = patch.concept_id
"""
RECIPES = """
    INSERT INTO recipe (name, base_id, revision, created_at)
    SELECT 'recipe ' || number, 1, 1, (:second || DIGITS || :zone) FROM (NUMBERS) AS numbers
"""
REVISIONS = """
    INSERT INTO revision (recipe_id, number, action, why, who, at, digest_before, digest_after)
    SELECT recipe.id, number, 'add', 'takedown ' || number, 'ada', (:second || DIGITS || :zone), NULL, NULL
    FROM (NUMBERS) AS numbers JOIN recipe ON number = 1 OR recipe.id <= :of
"""
CHANGES = """
    INSERT INTO revision_patch (revision_id, patch_id, strength_before, strength_after)
    SELECT revision.id, patch.id, NULL, 1.0
    FROM revision
    JOIN patch_text ON patch_text.id = 1 + (revision.recipe_id * 7 + revision.number) % (SELECT max(id) FROM patch_text)
    JOIN patch ON patch.id = patch_text.patch_id
"""
ENTRIES = """
    INSERT INTO recipe_patch (recipe_id, patch_id, strength)
    SELECT revision.recipe_id, revision_patch.patch_id, 1.0
    FROM revision JOIN revision_patch ON revision_patch.revision_id = revision.id
"""
REASONS = """
    INSERT INTO recipe_text (recipe_id, revision, text)
    SELECT recipe_id, number, LINE || why || LINE FROM revision
    UNION ALL SELECT id, 0, LINE || name || LINE || 'small' || LINE FROM recipe
"""


def _run(session: Session, sqlite: bool, statement: str, **values: object) -> None:
    recursive = "WITH RECURSIVE n(number) AS (SELECT 1 UNION ALL SELECT number + 1 FROM n WHERE number < :n)"
    made = {
        "NUMBERS": f"{recursive} SELECT number FROM n"
        if sqlite
        else "SELECT generate_series(1, CAST(:n AS integer)) AS number",
        "RANDOM_ID": "lower(hex(randomblob(32)))"
        if sqlite
        else "md5(CAST(random() AS text)) || md5(CAST(random() AS text))",
        "DIGITS": "printf('%06d', number % 1000000)" if sqlite else "lpad(CAST(number % 1000000 AS text), 6, '0')",
        "LINE": "char(10)" if sqlite else "chr(10)",
    }
    for word, sql in made.items():
        statement = statement.replace(word, sql)
    constants = {"second": "2026-01-01T00:00:00.", "zone": "+00:00", "settings": '{"rank":8,"regularisation":0.1}'}
    known = {key: value for key, value in {**constants, **values}.items() if f":{key}" in statement}
    session.execute(text(statement), known)


def calls(registry: Registry) -> dict[str, Callable[[], object]]:
    """What is asked."""
    some = registry.patches(limit=1, offset=777)[0]
    count, fresh, long = registry.count_patches(), itertools.count(), "recipe 3"
    laid = registry.recipe(long).entries[0].patch
    return {
        "patch list": lambda: registry.patches(limit=50, newest_first=True),
        "patch list, how many": registry.count_patches,
        "patch list, in the middle": lambda: registry.patches(limit=50, offset=count // 2),
        "patch list --concept": lambda: registry.patches(concept=some.concept, limit=50),
        "patch list --solver": lambda: registry.patches(solver="uce", limit=50, newest_first=True),
        "patch show, by id": lambda: registry.patch(some.id),
        "patch show, by beginning": lambda: registry.patch(some.id[:12]),
        "patch show, by concept": lambda: registry.patch(some.concept),
        "patch show, of nothing": lambda: _missed(registry, "nothing of the kind"),
        "search, a rare word": lambda: registry.search(RARE),
        "search, a common word": lambda: registry.search("object"),
        "search, words and filters": lambda: registry.search("tur ren", kind="object", solver="uce", base="small"),
        "search, nothing to be found": lambda: registry.search("nowhere at all"),
        "search, a reason": lambda: registry.search("takedown 999"),
        "patch added": lambda: _added(registry, some.concept, next(fresh)),
        "recipe list": lambda: registry.recipes(limit=50),
        "recipe names": registry.recipe_names,
        "recipe show": lambda: registry.recipe("recipe 30"),
        "recipe show, a thousand revisions": lambda: registry.recipe(long),
        "recipe show, at revision 500": lambda: registry.recipe(f"{long}@500"),
        "recipe add, on a thousand revisions": lambda: _changed(registry, long, laid, next(fresh)),
        "recipes with a patch": lambda: registry.recipes_with(laid),
        "recipe expired": lambda: registry.due(date(2030, 1, 1)),
    }


def _missed(registry: Registry, key: str) -> None:
    with suppress(NotFound):
        registry.patch(key)


def _added(registry: Registry, concept: str, number: int) -> None:
    blob = f"{number} {time.time_ns()}".encode()
    about = {"concept": concept, "base": "small", "solver": "uce", "kind": "text map"}
    registry.add_patch(id=hashlib.sha256(blob).hexdigest(), blob=blob, settings={}, seed=0, seconds=0.5, **about)


def _changed(registry: Registry, name: str, patch: str, number: int) -> None:
    registry.change_patches(name, {patch: RecipeEntry(patch, 2.0 + number)}, Note("", ""))


def timed(call: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Milliseconds of CPU and by the clock, each the least of some rounds."""
    cpu, clock = [], []
    for _ in range(rounds):
        started, started_cpu = time.perf_counter(), time.process_time()
        call()
        clock.append(1000 * (time.perf_counter() - started))
        cpu.append(1000 * (time.process_time() - started_cpu))
    return min(cpu), min(clock)


if __name__ == "__main__":
    main()
