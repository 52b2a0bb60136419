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
            lines = list(connection.iterdump())
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{models.HEAD}.sql"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    print(path)


if __name__ == "__main__":
    main()
