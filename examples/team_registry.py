"""One registry, three people: who did what and why, and another team that gets it with a signature.

python examples/team_registry.py [FOLDER [REGISTRY]]: REGISTRY is a folder, or postgresql://... as in examples/team.
docs/tutorials/team-registry.md explains.
"""

import sys
from pathlib import Path

import overpaint
from overpaint.registry.sharing.signing import new_key


def main(folder: Path, registry: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ours = overpaint.open(registry or folder / "registry")
    ours.add_base("emoji", "emoji", exist_ok=True)
    recipe = ours.create_recipe("service", base="emoji", exist_ok=True)
    recipe.add(ours.solve("cat", base="emoji"), why="request 12 of the owner", who="anna", exist_ok=True)
    recipe.tag("audited-2026-11", who="clara")

    key = folder / "team.key"
    new_key(key)
    ours.push(folder / "shared", recipes=["service"], sign=key)

    theirs = overpaint.open(folder / "theirs")
    theirs.add_base("emoji-of-theirs", "emoji", exist_ok=True)
    received = theirs.pull(folder / "shared", recipes=["service"], trust=[f"{key}.pub"])
    for line in theirs.recipe("service").log():
        print(f"{line.revision}  {line.who:6} {line.action:6} {line.concept:5} {line.why}")
    assert received.verified
    assert theirs.recipe("service").digest() == recipe.digest()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "team"), *sys.argv[2:3])
