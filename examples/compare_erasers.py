"""Judge several erasers on one base, by the same pictures.

python examples/compare_erasers.py [FOLDER [BASE]]: BASE is the embedded one, or a folder, a file or a Hub id of yours.
docs/tutorials/compare-erasers.md explains.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import overpaint

SOLVERS = ("separable", "uce", "rece")
CONCEPTS = ("cat", "pistol")


def main(folder: Path, base: str = "emoji", steps: int = 20, settings: Mapping[str, str] | None = None) -> None:
    workspace = overpaint.open(folder / "registry")
    workspace.add_base("mine", base, exist_ok=True)
    print(f"{'solver':12}{'still seen':>12}{'others left':>13}{'bytes':>9}")
    for solver in SOLVERS:
        recipe = workspace.create_recipe(solver, base="mine", exist_ok=True)
        patches = [workspace.solve(name, base="mine", solver=solver) for name in CONCEPTS]
        recipe.add_all(patches, exist_ok=True)
        numbers = recipe.evaluate("quick", settings=settings, steps=steps).record.results
        seen, left = (
            [number.value for number in numbers if number.subject.startswith(about) and number.metric == "accuracy"]
            for about in ("erased", "kept")
        )
        print(f"{solver:12}{share(seen):>12}{share(left):>13}{sum(patch.nbytes for patch in patches):>9,}")


def share(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.0%}" if values else "not asked"


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "compare-erasers"), *sys.argv[2:3])
