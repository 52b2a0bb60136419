"""The demo's findings as a page that a policy person and an engineer can both read."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import torch
from PIL import Image

import overpaint
from overpaint.evaluation.grid import labelled_grid
from overpaint.evaluation.report import Picture, PictureRow, Report, Section, Table, write_report

if TYPE_CHECKING:
    from overpaint.demo.findings import Findings
    from overpaint.demo.steps import Demo


def save_report(out: Path, demo: Demo, found: Findings) -> None:
    """Write `report.html` and `overview.png` into `out`."""
    sections = (_summary(found), _erased(found), _kept(found), _put_back(found))
    report = Report(
        title="Overpaint: what was erased, what was kept, what came back",
        intro="Seven concepts were erased from the embedded base, each by a patch of its own; two patches were taken off "
        "again; a checkpoint was built; at last everything was taken off. A patch hides a concept and does not destroy it: "
        "who holds the base can have it back, and published attacks can revive it in a checkpoint.",
        sections=sections,
        provenance=_provenance(demo, found),
        commands=("overpaint demo",),
    )
    write_report(out / "report.html", report)
    _overview(found).save(out / "overview.png")


def _summary(found: Findings) -> Section:
    rows = tuple((c.what, c.found, c.bar, "yes" if c.holds else "no") for c in found.checks)
    return Section(
        "Checks", table=Table(("what", "found", "bar", "holds"), rows, "What was promised and what was found")
    )


def _row(found: Findings, key: str, label: str, says: str) -> PictureRow:
    return PictureRow(label, tuple(Picture(p, f"{says}, picture {i + 1}") for i, p in enumerate(found.pictures[key])))


def _erased(found: Findings) -> Section:
    rows = tuple(
        (
            name,
            s.record.solver,
            str(found.base_scores[name]),
            str(found.erased_scores[name]),
            f"{s.seconds:.2f} s",
            f"{s.nbytes:,}",
        )
        for name, s in found.solved.items()
    )
    pictures = []
    for name in found.solved:
        pictures.append(_row(found, f"{name} before", f"{name}: base", f"The base asked for {name}"))
        pictures.append(_row(found, f"{name} after", f"{name}: erased", f"The safe recipe asked for {name}"))
    return Section(
        "Erased",
        "The judge is a small classifier trained on drawings, never on generated pictures. Prompts are from templates that "
        "training did not see. Each pair of rows has the same prompts and the same seeds.",
        Table(("concept", "solver", "base", "erased", "time", "bytes"), rows, "Accuracy with 95% intervals"),
        pictures=tuple(pictures),
    )


def _kept(found: Findings) -> Section:
    return Section(
        "Kept",
        f"All other objects: {found.kept} with all seven patches, {found.kept_base} on the base.",
        pictures=(
            _row(found, "kept before", "others: base", "The base asked for other objects"),
            _row(found, "kept after", "others: all patches", "The safe recipe asked for other objects"),
        ),
    )


def _put_back(found: Findings) -> Section:
    rows = tuple((name, str(found.base_scores[name]), str(score)) for name, score in found.restored_scores.items())
    pictures = tuple(
        _row(found, f"{n} put back", f"{n}: put back", f"{n} after its patch was taken off")
        for n in found.restored_scores
    )
    return Section(
        "Put back",
        "Their patches were taken off the recipe and the weights composed anew; the other five stay on.",
        Table(("concept", "base", "put back"), rows, "Accuracy with 95% intervals"),
        pictures=pictures,
    )


def _provenance(demo: Demo, found: Findings) -> tuple[tuple[str, str], ...]:
    return (
        *((f"weights, {name}", digest) for name, digest in found.digests.items()),
        *((f"patch, {name}", solved.id) for name, solved in found.solved.items()),
        ("vocabulary and concepts, encoded once", f"{found.prepare_seconds:.2f} s"),
        ("sampler", f"DDIM, {demo.sampler.steps} steps, guidance {demo.sampler.guidance:g}"),
        (
            "versions",
            f"overpaint {overpaint.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}",
        ),
        ("machine", f"{platform.machine()}, Python {platform.python_version()}, {torch.get_num_threads()} threads"),
    )


def _overview(found: Findings) -> Image.Image:
    """One labelled picture: the base, all patches on, and the two concepts that were put back."""
    shown = list(found.solved)
    rows = [
        ("base", [found.pictures[f"{n} before"][0] for n in shown] + [found.pictures["kept before"][1]]),
        ("seven patches on", [found.pictures[f"{n} after"][0] for n in shown] + [found.pictures["kept after"][1]]),
        (
            "two taken off again",
            [found.pictures.get(f"{n} put back", found.pictures[f"{n} after"])[0] for n in shown]
            + [found.pictures["kept after"][1]],
        ),
    ]
    return labelled_grid(rows, [*shown, "another object"], scale=2, title="")
