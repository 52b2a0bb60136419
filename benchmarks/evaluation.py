"""The published comparison: every suite on the embedded base, for every solver, as JSON and as `docs/results.md`.

The registry, its patches and all pictures are kept in a folder (`--work`); a run that is interrupted, or asked for more, goes on
where it was. `--only` and `--suites` narrow it down; `--pages` writes the page again from what is there. In full it takes
hours on two cores, most of them for the solvers that train.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import overpaint
from benchmarks.results_page import results_page
from benchmarks.tables import arguments, save, show
from overpaint.concepts import Concept
from overpaint.errors import OverpaintError
from overpaint.evaluating import Request
from overpaint.registry.evaluations import EvaluationRecord
from overpaint.solvers import SOLVERS
from overpaint.workshop import Workshop

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
BASE = "emoji"
SIX = ("cat", "car", "sun", "pistol", "rose", "ink")
TWELVE = (*SIX, "bomb", "pizza", "robot", "boat", "skull", "neon")
STYLES = {"ink": "flat", "neon": "flat"}
"""Concepts that are styles, with what they should become."""
TWELVE_TOO = ("separable", "sepme")
"""Solvers whose scenes are also played with twelve concepts."""
SUITES = ("quick", "grid", "generality", "crosstalk", "scenes", "probes", "cost")
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "sepme": {"preset": "emoji"},
    "esd": {"steps": "150", "lr": "3e-4", "batch": "16"},
    "few_shot": {"steps": "10", "lr": "1e-3", "batch": "8", "guidance": "3.0"},
    "few_shot_lora": {"lr": "1e-3", "batch": "8", "guidance": "3.0"},
    "surgical": {"steps": "100", "lr": "3e-4", "batch": "8"},
    "ablation": {"steps": "150", "lr": "3e-4", "batch": "8", "guidance": "3.0", "pictures": "64"},
    "sdd": {"steps": "150", "lr": "3e-4", "batch": "8"},
    "spm": {"steps": "300", "lr": "1e-3", "warm_up": "50"},
}
"""For a base whose text is 192 wide and whose pictures are 64 pixels; the solvers' defaults are for Stable Diffusion."""


def main() -> None:
    """Run what is asked for and write the page."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "evaluation", help="registry and pictures")
    parser.add_argument("--only", default=",".join(SOLVERS), help="solvers, with commas between")
    parser.add_argument("--suites", default=",".join((*SUITES, "scale")), help="suites, with commas between")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pages", action="store_true", help="run nothing; write the results from what is there")
    asked = parser.parse_args()
    shop = _shop(asked.work)
    failed = {} if asked.pages else _run(shop, asked)
    records = [record for record in _records(shop) if record.suite in asked.suites.split(",")]
    _write(records, failed)
    rows = [[r.recipe, r.suite, r.seconds, len(r.results), r.judge] for r in records]
    save(asked.json, show("Evaluated", ["recipe", "suite", "seconds", "numbers", "judge"], rows))


def _shop(work: Path) -> Workshop:
    shop = overpaint.open(work)
    if not shop.bases():
        shop.add_base(BASE, "emoji")
    for name in TWELVE:
        kind = "style" if name in STYLES else "object"
        shop.registry.ensure_concept(Concept(name, kind, anchor=STYLES.get(name, "")))
    return shop


def _run(shop: Workshop, asked: Namespace) -> dict[str, str]:
    """Solve and evaluate; what a solver or a suite refuses is written down with its reason and does not stop the rest."""
    failed: dict[str, str] = {}
    suites = [suite for suite in asked.suites.split(",") if suite in SUITES]
    for solver in asked.only.split(","):
        for count, names in ((6, SIX), (12, TWELVE)):
            recipe = f"{solver}-{count}"
            # Twelve are beyond what SepME can hold on Stable Diffusion; for the others, six say enough.
            wanted = suites if count == 6 else [s for s in suites if s == "scenes" and solver in TWELVE_TOO]
            try:
                if wanted:
                    _lay(shop, recipe, solver, names, asked.device)
                for suite in wanted:
                    _evaluate(shop, recipe, Request(suite, steps=asked.steps, device=asked.device))
            except OverpaintError as error:
                failed[recipe] = str(error)
                click.echo(f"{recipe}: {error}", err=True)
    if "scale" in asked.suites.split(",") and "separable" in asked.only.split(","):
        scaled = ",".join(["separable", *(s for s in ("uce", "rece", "nullspace") if s in SOLVERS)])
        settings = {"solvers": scaled, "most": "32", "pictures": "64"}
        _evaluate(shop, "separable-6", Request("scale", settings, steps=asked.steps, device=asked.device))
    return failed


def _lay(shop: Workshop, recipe: str, solver: str, names: tuple[str, ...], device: str) -> None:
    """A recipe with one patch of the solver for each concept; those that lie there are not solved again."""
    laid = shop.recipe(recipe, base=BASE)
    there = {record.concept for record, _ in laid.patches()}
    for name in names:
        if name not in there:
            click.echo(f"{recipe}: solving {name}", err=True)
            concept = next(concept for concept in shop.concepts() if concept.name == name)
            laid.add(_solved(shop, concept, solver, device), why="the published comparison")


def _solved(shop: Workshop, concept: Concept, solver: str, device: str) -> str:
    for record in shop.patches(concept=concept.name, solver=solver):
        return record.id
    return shop.solve(concept, base=BASE, solver=solver, settings=SETTINGS.get(solver, {}), device=device).id


def _evaluate(shop: Workshop, recipe: str, request: Request) -> None:
    """Run a suite unless the recipe, as it is, has its numbers."""
    if any(record.suite == request.suite for record in shop.known_recipe(recipe).evaluations()):
        return
    click.echo(f"{recipe}: {request.suite}", err=True)
    shop.evaluate(recipe, request, report=_progress)
    click.echo("", err=True)


def _progress(done: int, of: int, text: str) -> None:
    click.echo(f"\r  {done}/{of} {text}    ", nl=False, err=True)


def _records(shop: Workshop) -> list[EvaluationRecord]:
    names = [record.name for record in shop.recipes()]
    return [record for name in names for record in shop.known_recipe(name).evaluations()]


def _write(records: list[EvaluationRecord], failed: Mapping[str, str]) -> None:
    """One JSON file for each recipe and suite instead of those that were there, and the page over all of them."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for old in RESULTS.glob("*.json"):
        old.unlink()
    for record in records:
        said: dict[str, Any] = {**asdict(record), "at": record.at.isoformat(timespec="seconds")}
        del said["who"]
        file = RESULTS / f"{record.recipe}-{record.suite}.json"
        file.write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", "utf-8")
    PAGE.write_text(results_page(records, failed), "utf-8")


if __name__ == "__main__":
    main()
