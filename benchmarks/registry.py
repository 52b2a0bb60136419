"""What a large registry costs: `python -m benchmarks.registry [--patches N] [--json FILE]`.

A registry of a thousand patches and one of N, each patch of a concept of its own, are asked the same things in turns.
Times are those of whole calls, the database being a part of them; memory is the highest resident size of a fresh program
that asks everything, less what it had before. Commands are timed as programs of their own, in seconds of CPU time beside
`import torch`; `patch add` is on the embedded base. Then eight processes write at once, on SQLite and, where a PostgreSQL server
is installed, on one that is started for it.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import multiprocessing
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from sqlalchemy import insert

import overpaint
from benchmarks import tables
from overpaint.core.concepts import Concept
from overpaint.core.errors import NotFound
from overpaint.core.names import checked_json
from overpaint.registry import Registry, models, queries
from overpaint.registry.history import Note
from overpaint.registry.records import RecipeEntry
from overpaint.registry.schema import connect

SMALL = 1000
RARE = "quagga"
"""One patch in a thousand is of one."""
WRITERS, WRITES = 8, 200
BAR, BAR_OPEN = 100.0, 50.0
"""Milliseconds that a call may take on the large registry."""
START = datetime(2026, 1, 1, tzinfo=timezone.utc)


def main() -> None:
    parser = tables.arguments(__doc__ or "")
    parser.add_argument("--patches", type=int, default=100_000, help="how many the large registry has")
    parser.add_argument("--rounds", type=int, default=15, help="how often each thing is asked")
    parser.add_argument("--writes", type=int, default=WRITES, help="how often each of eight processes writes; 0: none")
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.ask:
        print(memory_of_asking(chosen.ask))
        return
    shown = []
    with tempfile.TemporaryDirectory(prefix="overpaint-benchmark-") as folder:
        small, large = Path(folder) / "small", Path(folder) / "large"
        fill(small, SMALL)
        seconds = timed(lambda: fill(large, chosen.patches))
        size = (large / "registry.db").stat().st_size / 2**20
        print(f"filled in {seconds:.0f} s; the database has {size:.0f} MiB", file=sys.stderr)
        columns = ["call", f"{SMALL} patches, ms", f"{chosen.patches} patches, ms", "ratio", "of it CPU, ms", "bar, ms"]
        shown.append(tables.show("Calls, median", columns, times(small, large, chosen.rounds)))
        columns = [f"{SMALL} patches, MiB", f"{chosen.patches} patches, MiB"]
        shown.append(tables.show("Memory of asking all of it", columns, [[memory_apart(small), memory_apart(large)]]))
        columns = ["command", f"CPU on {chosen.patches} patches, s", "of `import torch`"]
        shown.append(tables.show("Commands, the best of three", columns, list(commands(large, Path(folder) / "emoji"))))
    if chosen.writes:
        columns = ["database", "processes", "writes of each", "seconds", "writes a second"]
        shown.append(tables.show("Writing at once", columns, list(writing_at_once(chosen.writes))))
    tables.save(chosen.json, *shown)


# A registry to ask


def fill(folder: Path, patches: int, *, batch: int = 5000) -> None:
    """Make a registry of so many patches, named by two words out of two thousand and a number."""
    registry = Registry.open(folder)
    registry.add_base("small", Path("/models/small"), "sd1", "f" * 64)
    registry.create_recipe("safe", "small")
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubcdfghlmnprst", k=draw.randint(4, 9))) for _ in range(2000)]
    for first in range(0, patches, batch):
        numbers = range(first, min(first + batch, patches))
        concepts = [concept_of(number, words, draw) for number in numbers]
        with connect(folder, create=False).writing() as session:
            session.execute(
                insert(models.ConceptRow), [concept_row(*each) for each in zip(numbers, concepts, strict=True)]
            )
            session.execute(insert(models.PatchRow), [patch_row(number) for number in numbers])
            found_by = (queries.of_patch(concept, "text map", "separable", "small", 1) for concept in concepts)
            rows = [{"patch_id": id_of(each), "text": text} for each, text in zip(numbers, found_by, strict=True)]
            session.execute(insert(models.PatchTextRow), rows)
    for number in range(20):
        lay(registry, number, 1.0)


def concept_of(number: int, words: list[str], draw: random.Random) -> Concept:
    name = f"{RARE if number % 1000 == 7 else draw.choice(words)} {draw.choice(words)} {number}"
    return Concept(name, synonyms=tuple(draw.choices(words, k=3)), anchor="thing")


def concept_row(number: int, concept: Concept) -> dict[str, Any]:
    definition = as_text(concept.as_json())
    return {"id": number + 1, "name": concept.name, "kind": concept.kind, "definition": definition}


def patch_row(number: int) -> dict[str, Any]:
    return {
        "id": id_of(number),
        "concept_id": number + 1,
        "base_id": 1,
        "solver": "separable",
        "kind": "text map",
        "settings": as_text({"rank": 8, "regularisation": 0.1, "weight": 3.0, "templates": 10, "padding": True}),
        "seed": 0,
        "nbytes": 12_000,
        "blob": id_of(-number - 1),
        "seconds": 0.5,
        "solved_at": START + timedelta(seconds=number),
    }


def id_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def lay(registry: Registry, number: int, strength: float | None) -> int:
    return set_strength(registry, id_of(number), strength, Note("", "", "0" * 64, "0" * 64))


def set_strength(registry: Registry, patch: str, strength: float | None, note: Note) -> int:
    """Set one patch of the recipe safe, or remove it; the new revision."""
    entry = None if strength is None else RecipeEntry(patch, strength)
    return registry.change_patches("safe", {patch: entry}, note)


# What is asked


def calls(folder: Path) -> dict[str, tuple[Callable[[], object], float]]:
    """What is asked of a registry, and how many milliseconds it may take."""
    registry, fresh = Registry.open(folder), itertools.count()
    some = registry.patch(id_of(777)).concept
    return {
        "open": (lambda: Registry.open(folder), BAR_OPEN),
        "patch list": (lambda: (registry.patches(limit=50, newest_first=True), registry.count_patches()), BAR),
        "patch list, in the middle": (lambda: registry.patches(limit=50, offset=registry.count_patches() // 2), BAR),
        "patch list --concept": (lambda: registry.patches(concept=some, limit=50), BAR),
        "patch list --solver": (lambda: registry.patches(solver="separable", limit=50, newest_first=True), BAR),
        "patch show, by id": (lambda: registry.patch(id_of(500)), BAR),
        "patch show, by beginning": (lambda: registry.patch(id_of(500)[:12]), BAR),
        "patch show, by concept": (lambda: registry.patch(some), BAR),
        "patch show, of nothing": (lambda: missed(lambda: registry.patch("nothing of the kind")), BAR),
        "search, a rare word": (lambda: registry.search(RARE), BAR),
        "search, a common word": (lambda: registry.search("object"), BAR),
        "search, three letters and filters": (
            lambda: registry.search("tur ren", kind="object", solver="separable", base="small"),
            BAR,
        ),
        "search, nothing to be found": (lambda: registry.search("nowhere at all"), BAR),
        "patch add, its rows": (lambda: lay(registry, 900, random.random()), BAR),
        "solve, its rows and its blob": (lambda: store(registry, some, next(fresh)), BAR),
        "tag add and remove": (lambda: (registry.tag("t", patches=[id_of(5)], who=""), untag(registry)), BAR),
        "recipe show": (lambda: registry.patches_on("safe"), BAR),
        "recipe due": (lambda: registry.due(date(2030, 1, 1)), BAR),
    }


def missed(look: Callable[[], object]) -> None:
    try:
        look()
    except NotFound:
        return
    raise AssertionError("something was found")


def store(registry: Registry, concept: str, number: int) -> None:
    blob = f"{number} of {time.time_ns()}".encode()
    registry.add_patch(
        id=hashlib.sha256(blob).hexdigest(),
        blob=blob,
        concept=concept,
        base="small",
        solver="separable",
        kind="text map",
        settings={},
        seed=0,
        seconds=0.5,
    )


def untag(registry: Registry) -> None:
    registry.untag("t", patches=[id_of(5)])


def times(small: Path, large: Path, rounds: int) -> list[list[Any]]:
    """A row for each call: its median on both registries, their ratio, its share of a core, and what it may take."""
    of_small, of_large = calls(small), calls(large)
    rows = []
    for name, (_, bar) in of_large.items():
        on_small, on_large, on_cores = [], [], []
        for _ in range(rounds + 1):  # of which the first is not counted: it fills caches
            on_small.append(timed(of_small[name][0]))
            before = time.process_time()
            on_large.append(timed(of_large[name][0]))
            on_cores.append(time.process_time() - before)
        first, second, cpu = (1000 * statistics.median(each[1:]) for each in (on_small, on_large, on_cores))
        rows.append([name, first, second, second / first, cpu, bar])
    return rows


def timed(call: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def memory_apart(folder: Path) -> float:
    """MiB that a program of its own needs to ask everything twice."""
    words = [sys.executable, "-m", "benchmarks.registry", "--ask", str(folder)]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def memory_of_asking(folder: Path) -> float:
    Registry.open(folder).bases()  # so that what every registry needs is there before
    before = highest_resident_size()
    for _ in range(2):
        for call, _ in calls(folder).values():
            call()
    return highest_resident_size() - before


def highest_resident_size() -> float:
    """MiB, of this program alone: what `getrusage` tells begins with that of the program that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


# Commands

COMMANDS = ("recipe show safe", "recipe log safe", "recipe list", "patch list", "concept list", f"search {RARE}")


def commands(large: Path, emoji: Path) -> Iterator[list[Any]]:
    """A row for each command: its CPU time, and how often `import torch` fits in."""
    with_torch = cpu_of("-c", "import torch")
    yield ["(import torch)", with_torch, 1.0]
    for command in COMMANDS:
        seconds = cpu_of("-m", "overpaint", "--registry", str(large), *command.split())
        yield [command, seconds, seconds / with_torch]
    workspace = overpaint.open(emoji)
    workspace.add_base("emoji", "emoji")
    patch = workspace.solve("cat", base="emoji", solver="uce")
    strengths = itertools.count(1)

    def add() -> list[str]:
        return [
            "-m",
            "overpaint",
            "--registry",
            str(emoji),
            "patch",
            "add",
            patch.id,
            "--strength",
            str(next(strengths)),
        ]

    seconds = min(cpu_once(*add()) for _ in range(3))
    yield ["patch add, on the embedded base", seconds, seconds / with_torch]


def cpu_of(*words: str) -> float:
    return min(cpu_once(*words) for _ in range(3))


def cpu_once(*words: str) -> float:
    """Seconds of CPU time that a fresh interpreter takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# Many writers


def writing_at_once(writes: int) -> Iterator[list[Any]]:
    """A row for each database there is."""
    for name, place in places():
        with place as location:
            registry = Registry.open(location)
            registry.add_base("small", Path("/models/small"), "sd1", "f" * 64)
            registry.add_concept(Concept("thing"))
            registry.create_recipe("safe", "small")
            with ProcessPoolExecutor(WRITERS, mp_context=multiprocessing.get_context("forkserver")) as pool:
                list(pool.map(write, [location] * WRITERS, range(WRITERS), [1] * WRITERS))  # everything is imported
                started = time.perf_counter()
                done = list(pool.map(write, [location] * WRITERS, range(WRITERS), [writes] * WRITERS))
                seconds = time.perf_counter() - started
            check(registry, done, writes)
        yield [name, WRITERS, writes, seconds, WRITERS * writes / seconds]


def write(location: str, writer: int, writes: int) -> int:
    """Store patches and change one recipe, in turns; tell how often the recipe was changed."""
    registry, changed = Registry.open(location, create=False), 0
    for turn in range(writes):
        if turn % 2 == 0:
            store(registry, "thing", writer)
            continue
        mine = registry.patches(limit=1, offset=writer)[0].id
        lies = mine in dict(registry.recipe("safe").patches)
        set_strength(registry, mine, None if lies else 1.0, Note("", ""))
        changed += 1
    return changed


def check(registry: Registry, changed: list[int], writes: int) -> None:
    """That nothing was lost and nothing done twice."""
    revisions = [line.revision for line in registry.log("safe")]
    assert revisions == list(range(1, sum(changed) + 1)), "a revision was lost"
    assert registry.count_patches() == WRITERS * (writes - writes // 2 + 1), "a patch was lost"


def places() -> Iterable[tuple[str, Any]]:
    """The databases there are, each as a block that gives an empty one's location."""
    from tests.registry.postgres_server import programs, running

    @contextmanager
    def on_disk() -> Iterator[str]:
        with tempfile.TemporaryDirectory(prefix="overpaint-benchmark-") as folder:
            yield folder

    @contextmanager
    def on_server(bin: Path) -> Iterator[str]:
        with running(bin) as server, tempfile.TemporaryDirectory(prefix="overpaint-benchmark-") as folder:
            yield server.url(server.create(), Path(folder))

    yield "SQLite", on_disk()
    bin = programs()
    if bin is not None:
        yield "PostgreSQL", on_server(bin)


def as_text(value: dict[str, Any]) -> str:
    """As the registry writes it."""
    return checked_json(value, "a benchmark's value")


if __name__ == "__main__":
    main()
