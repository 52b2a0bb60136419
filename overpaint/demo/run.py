"""Runs the demo with its progress shown, prints its tables and writes its report."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from overpaint.demo.findings import check_table, concept_table
from overpaint.demo.report import save_report
from overpaint.demo.steps import Demo
from overpaint.errors import AlreadyExists


def run(out: Path, *, quick: bool = False) -> bool:
    """Run the demo into the new folder `out`, print its table, write `report.html`. False when a check does not hold.

    Raises AlreadyExists when `out` is there and not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise AlreadyExists(f"{out} is not empty; name another folder with -o, or remove it")
    talk = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=talk) as progress:
        task = progress.add_task("opening a fresh registry", total=1.0)

        def report(share: float, text: str) -> None:
            progress.update(task, completed=share, description=text)
            if not talk.is_terminal:
                talk.print(f"{share:4.0%} {text}", highlight=False)

        demo = Demo(out, quick, report)
        found = demo.run()
        save_report(out, demo, found)
        progress.update(task, completed=1.0, description="done")
    console = Console()
    console.print(concept_table(found))
    console.print(check_table(found))
    console.print(
        f"{found.prepare_seconds:.1f} s once to encode the vocabulary and the concepts, then the seconds above for each",
        highlight=False,
    )
    console.print(
        f"{found.seconds:.0f} s. Report: {out / 'report.html'}; checkpoint: {out / 'checkpoint'}", highlight=False
    )
    return all(check.holds for check in found.checks)
