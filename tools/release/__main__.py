"""Build the wheel and the source archive, and use the wheel as somebody would who has just installed it: `make wheel-check`.

Nothing is downloaded: the packages it depends on are those of the environment that runs this. The new environment has its
own `overpaint`, sees no folder of this repository, and goes from `overpaint --version` to a patched base and back.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMANDS = """
init
base add emoji
solve cat --base emoji --set vocabulary=64
patch add cat --recipe safe
generate "a picture of a cat" --recipe safe --steps 2 -o cat.png
patch remove cat --recipe safe
build safe safe.safetensors
inspect safe.safetensors
verify
"""
IN_ONE_PROCESS = f"""
import shlex
from overpaint.cli import main
for line in {COMMANDS.strip().splitlines()!r}:
    main.main(shlex.split(line), standalone_mode=False)
"""
"""The commands, without loading PyTorch for each of them."""


def main() -> None:
    """Stops with an error where something is missing."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="overpaint-release-") as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", ROOT, quiet=True)
        wheel, archive = next((folder / "dist").glob("*.whl")), next((folder / "dist").glob("*.tar.gz"))
        run(sys.executable, "-m", "twine", "check", "--strict", wheel, archive)
        check_contents(wheel, archive)
        program = install(wheel, folder / "clean")
        (folder / "home").mkdir()
        run(program, "--version", cwd=folder / "home")
        run(program.parent / "python", "-I", "-c", IN_ONE_PROCESS, cwd=folder / "home", quiet=True)
    print(f"{wheel.name} and {archive.name}: built, checked, installed and used in {time.monotonic() - start:.0f} s")


def check_contents(wheel: Path, archive: Path) -> None:
    """The wheel has every tracked file of the package and nothing of its tests; the archive has what tests and docs need."""
    listed = subprocess.run(["git", "ls-files", "overpaint"], cwd=ROOT, capture_output=True, text=True, check=False)
    wanted = set(listed.stdout.split()) or {str(p.relative_to(ROOT)) for p in (ROOT / "overpaint").rglob("*.py")}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    if held != wanted:
        sys.exit(f"the wheel lacks {sorted(wanted - held)} and has too much in {sorted(held - wanted)}")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    needed = {"tests/conftest.py", "docs/patch-format.md", "mkdocs.yml", "Makefile", "constraints.txt", "LICENSE"}
    if not needed <= names:
        sys.exit(f"the source archive lacks {sorted(needed - names)}")


def install(wheel: Path, folder: Path) -> Path:
    """The program `overpaint` of a new environment that has the wheel, and beside it only what it depends on."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / ("python.exe" if os.name == "nt" else "python")
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    ).stdout.strip()
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-compile",
    ]
    run(*pip, "--no-warn-script-location", wheel)
    # Paths in a .pth file are searched last, and .pth files of theirs (an editable install of ours) are not read.
    (Path(site) / "dependencies.pth").write_text(
        "\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}), "utf-8"
    )
    return scripts / "overpaint"


def environment() -> dict[str, str]:
    """Ours, without what leads to this repository or to somebody's registry."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OVERPAINT_REGISTRY")}
    return {**kept, "OVERPAINT_REGISTRY": "registry", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}


def run(*words: str | Path, cwd: Path | None = None, quiet: bool = False) -> None:
    """Run a program; what it printed is shown when it fails."""
    found = subprocess.run([str(word) for word in words], cwd=cwd, env=environment(), capture_output=quiet, text=True)
    if found.returncode:
        print(found.stdout or "", found.stderr or "", sep="\n", file=sys.stderr)
        sys.exit(f"{' '.join(map(str, words))} ended with {found.returncode}")


if __name__ == "__main__":
    main()
