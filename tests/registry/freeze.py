"""Freeze a registry at the revision of this program: `python -m tests.registry.freeze` writes `frozen/REVISION.sql`.

It writes what the code of this checkout makes: run it before the tables change. `test_upgrades.py` upgrades every file of
`frozen/`, and then uses it.
"""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from overpaint.core.concepts import Concept
from overpaint.registry import Registry, models

from .contents import add_patch, digest_of, lay, stock

FOLDER = Path(__file__).parent / "frozen"
OF_INDEX = (
    "PRAGMA writable_schema",
    "INSERT INTO sqlite_master",
    'INSERT INTO "patch_pieces',
    "CREATE TABLE 'patch_pieces_",
)
"""Beginnings of the lines of a dump that are about the index of searches."""
LABELS = ("one", "two", "three")
"""The patches of a frozen registry; a blob is its patch's label."""


def fill(registry: Registry) -> None:
    """What every frozen registry holds: three patches, and a recipe that was changed in each way there is."""
    stock(registry)
    registry.add_base("large", Path("/models/large"), "sdxl", "e" * 8)
    registry.add_concept(Concept("Äpfel & 'Birnen'", "style", ("Pomologie", "fruit; still life"), "一枚の絵"))
    for label, concept in zip(LABELS, ("apple", "Äpfel & 'Birnen'", "apple"), strict=True):
        add_patch(registry, label, concept=concept)
    registry.create_recipe("safe", "small")
    registry.create_recipe("empty", "large")
    for label, strength in (("one", 1.0), ("two", 0.5), ("one", 2.0), ("one", None), ("three", 1.0)):
        lay(registry, "safe", digest_of(label), strength, why=f"Übung: {label}\nin two lines")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        fill(Registry.open(folder))
        with closing(sqlite3.connect(Path(folder) / "registry.db")) as connection:
            lines = [line for line in connection.iterdump() if not line.startswith(OF_INDEX)]
            made = connection.execute("SELECT sql FROM sqlite_master WHERE sql LIKE 'CREATE VIRTUAL TABLE%'").fetchall()
    # SQLite makes the tables behind an index by itself; a dump of them could not be read again.
    at = next(number for number, line in enumerate(lines) if line.startswith("CREATE TRIGGER"))
    lines[at:at] = [f"{statement};" for (statement,) in made]
    lines.insert(-1, "INSERT INTO patch_pieces (patch_pieces) VALUES ('rebuild');")
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{models.HEAD}.sql"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    print(path)


if __name__ == "__main__":
    main()
