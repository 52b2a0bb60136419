"""Does Overpaint run on the lowest versions that `pyproject.toml` allows? `python -m tools.lower_bounds [PACKAGE ...]`.

The light dependencies (or those that are named) are installed at their lower bounds into an environment of their own, which
finds everything else, PyTorch above all, in the environment that runs this. There the main job is done once on a tiny base:
solve, add, build, inspect, export, import, report, verify. Exit code 1 when something fails; the last line says what.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
from importlib.metadata import requires
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "diffusers")
"""Not installed a second time: gigabytes, and tied to each other."""


def lower_bounds(pyproject: Path) -> dict[str, str]:
    """The lowest version that is allowed of each light dependency, by name; what the heavy ones that are here need, counts."""
    listed = tomllib.loads(pyproject.read_text("utf-8"))["project"]["dependencies"]
    needed = [Requirement(each) for heavy in HEAVY for each in requires(heavy) or ()]
    lowest: dict[str, Version] = {}
    for each in [
        *map(Requirement, listed),
        *(each for each in needed if each.marker is None or each.marker.evaluate()),
    ]:
        for clause in each.specifier:
            if clause.operator == ">=":
                lowest[each.name] = max(Version(clause.version), lowest.get(each.name, Version("0")))
    names = {Requirement(each).name for each in listed} - set(HEAVY)
    return {name: str(lowest[name]) for name in sorted(names)}


def environment(folder: Path, pins: list[str]) -> Path:
    """A Python with `pins` installed, which finds everything else where this one does."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (Path(own) / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n", "utf-8")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps", "--only-binary=:all:", *pins],
        check=True,
    )
    return python


def main_job(folder: Path) -> None:
    """Everything a person does first, on a tiny base."""
    from click.testing import CliRunner

    import overpaint
    from overpaint.cli import main
    from overpaint.evaluation.report_page import Report, Section, Table, render
    from overpaint.testing import tiny_base

    def command(*words: object) -> str:
        result = CliRunner().invoke(main, ["--registry", str(folder / "registry"), *map(str, words)])
        if result.exit_code:
            raise SystemExit(f"overpaint {' '.join(map(str, words))}: {result.output}{result.exception!r}")
        return result.output

    tiny_base(folder / "tiny")
    (folder / "concepts.yaml").write_text("concepts:\n- dog\n- {name: sun, synonyms: [sunshine]}\n", "utf-8")
    workspace = overpaint.open(folder / "registry")
    workspace.add_base("tiny", folder / "tiny")
    workspace.solve("cat", base="tiny")
    command("solve", "--from", folder / "concepts.yaml", "--base", "tiny")
    command("patch", "add", "cat", "dog", "--recipe", "safe")
    command("build", "safe", folder / "built")
    command("inspect", folder / "built")
    command("recipe", "export", "safe", "-o", folder / "safe.safetensors")
    command("patch", "import", folder / "safe.safetensors", "--base", "tiny", "--concept", "pets")
    for words in (
        ["patch", "remove", "cat", "--recipe", "safe"],
        ["recipe", "log", "safe"],
        ["search", "cat"],
        ["verify"],
    ):
        command(*words)
    assert "<table" in render(Report("t", "", (Section("s", table=Table(("a",), (("x",),))),)))


def run(names: list[str]) -> int:
    bounds = lower_bounds(ROOT / "pyproject.toml")
    chosen = {name: bounds[name] for name in names or bounds}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = environment(folder / "venv", [f"{name}=={low}" for name, low in chosen.items()])
        done = subprocess.run([python, "-m", "tools.lower_bounds", "--job", str(folder)], cwd=ROOT)
    versions = ", ".join(f"{name} {low}" for name, low in chosen.items())
    print(f"{'runs' if not done.returncode else 'FAILS'} with {versions}")
    return int(done.returncode != 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        main_job(Path(sys.argv[2]))
    else:
        sys.exit(run(sys.argv[1:]))
