"""A style goes on Monday and is back on Friday; the weights are those of a week in which nothing happened to it.

python examples/monday_friday.py [FOLDER]: a registry and two pictures in a new folder. docs/tutorials/monday-friday.md explains.
"""

import sys
from pathlib import Path

import overpaint

PROMPT = "a picture of a banana in ink style"


def main(folder: Path, steps: int = 20) -> None:
    workspace = overpaint.open(folder / "registry")
    workspace.add_base("emoji", "emoji", exist_ok=True)
    workspace.add_concept("ink", kind="style", exist_ok=True)
    workspace.add_concept("cat", synonyms=["kitty", "feline"], exist_ok=True)
    recipe = workspace.create_recipe("house", base="emoji", exist_ok=True)
    pipe = recipe.pipeline(device="cpu")
    pipe.set_progress_bar_config(disable=True)

    recipe.add(workspace.solve("ink", base="emoji"), 1.3, why="takedown request, ticket 4711")
    pipe(PROMPT, num_inference_steps=steps).images[0].save(folder / "monday.png")
    recipe.add(workspace.solve("cat", base="emoji"), why="the owner of the cat objects")
    recipe.remove("ink", why="licence signed")
    pipe(PROMPT, num_inference_steps=steps).images[0].save(folder / "friday.png")

    for line in recipe.log():
        print(f"{line.revision}  {line.action:6} {line.concept:5} {line.why:32} {line.digest_after[:12]}")
    never = workspace.create_recipe("never-had-it", base="emoji", exist_ok=True)
    never.add("cat", exist_ok=True)
    assert recipe.digest() == never.digest(), "as if Monday had never been"


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "monday-friday"))
