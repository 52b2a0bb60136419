"""Build a checkpoint without weapons, and read what is erased in it as whoever gets it does.

python examples/safe_checkpoint.py [FOLDER]: a registry and safe.safetensors. docs/tutorials/safe-checkpoint.md explains.
"""

import sys
from pathlib import Path

import overpaint
from overpaint.patches.inspect import inspect

UNSAFE = {"pistol": ["gun", "handgun"], "dagger": ["knife", "blade"], "bomb": ["explosive"]}


def main(folder: Path) -> None:
    workspace = overpaint.open(folder / "registry")
    workspace.add_base("emoji", "emoji", exist_ok=True)
    for name, synonyms in UNSAFE.items():
        workspace.add_concept(name, kind="unsafe", synonyms=synonyms, exist_ok=True)
    recipe = workspace.create_recipe("safe", base="emoji", exist_ok=True)
    recipe.add_all([workspace.solve(name, base="emoji") for name in UNSAFE], why="for a shared machine", exist_ok=True)

    built = recipe.build(folder / "safe.safetensors")
    found = inspect(built.path)
    print(f"{built.path}: {', '.join(sorted(UNSAFE))} erased, weights {built.digest[:12]}")
    print(found)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "safe-checkpoint"))
