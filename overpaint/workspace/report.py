"""Pages about a recipe: the report of what was measured, and the model card of a build.

A report has the latest run of every suite, pictures for the same seeds, and where it all comes from.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overpaint.bases.loading import resolve_device
from overpaint.core.atomic import require_parent, write_over
from overpaint.core.display import html_table
from overpaint.core.errors import AlreadyExists, OverpaintError
from overpaint.core.progress import Progress, silent
from overpaint.evaluation.context import EvaluatedPatch
from overpaint.evaluation.images import ImageGenerator, Sampler
from overpaint.evaluation.metrics import Measurement
from overpaint.evaluation.prompts import OBJECT, EvalPrompt, PromptSet, evenly_spaced
from overpaint.evaluation.reports import sections
from overpaint.evaluation.reports.html import Picture, PictureRow, Report, Section, Table, rendered, write_report
from overpaint.evaluation.reports.sections import Numbers, save_figures
from overpaint.patches.compose import Term
from overpaint.registry.records import PatchRecord, RecipeRecord
from overpaint.registry.registry import EvaluationRecord
from overpaint.workspace.evaluating import Subject, image_cache, prompt_set_of

if TYPE_CHECKING:
    from overpaint.workspace.opened import OpenRegistry

SHOWN = 6
"""Pictures in a row."""


@dataclass(frozen=True)
class Reported:
    """The files that were written, the page first, and what was left out and why."""

    files: tuple[Path, ...]
    notices: tuple[str, ...]

    def __repr__(self) -> str:
        return f"<Reported {self.files[0]} and {len(self.files) - 1} files beside it>"

    def _repr_html_(self) -> str:
        return html_table(repr(self), ["file", "bytes"], [(file, f"{file.stat().st_size:,}") for file in self.files])


def report(
    opened: OpenRegistry, name: str, out: Path, *, device: str = "auto", progress: Progress = silent
) -> Reported:
    """Write `out` (HTML) about a recipe, and beside it its numbers as JSON and CSV and its figures as PNG.

    Everything is read from the registry except for the pictures, which are drawn (or taken from the cache of the last
    evaluation). Raises OverpaintError when the recipe was never evaluated, AlreadyExists when one of the files is there.
    """
    registry, subject = opened.registry, Subject.named(opened.registry, name)
    base, patches = opened.base(subject.base), [opened.patch(record.id) for record, _ in subject.entries]
    records = registry.evaluations(recipe=name, latest=True)
    if not records:
        raise OverpaintError(f"recipe {name!r} was not evaluated as it is now; run `overpaint evaluate {name}` first")
    _refuse_existing(out)
    sampler = Sampler.of(base, records[-1].settings["sampler"]["steps"], records[-1].settings["sampler"]["guidance"])
    generator = ImageGenerator(base, sampler, image_cache(registry), resolve_device(device), progress)
    evaluated = [EvaluatedPatch(p, strength) for p, (_, strength) in zip(patches, subject.entries, strict=True)]
    prompt_set = prompt_set_of(base, (*registry.concepts(), *(patch.concept for patch in patches)))
    rows = _picture_rows(generator, prompt_set, evaluated, records[-1].seed)
    runs = {record.suite: record for record in records}
    weights = generator.digest([each.term for each in evaluated])
    provenance = _provenance(subject, runs, {"base fingerprint": base.fingerprint, "weights of the recipe": weights})
    numbers = {suite: numbers_of(record) for suite, record in runs.items()}
    write_report(out, _page(registry.recipe(name), subject, runs, numbers, rows, provenance))
    figures, notices = save_figures(out, numbers)
    return Reported((out, *save_numbers(out, records), *figures), tuple(notices))


def _refuse_existing(out: Path) -> None:
    require_parent(out)
    beside = [out, *(out.with_suffix(suffix) for suffix in (".json", ".csv")), *out.parent.glob(f"{out.stem}-*.png")]
    if existing := [path for path in beside if path.exists()]:
        raise AlreadyExists(f"{existing[0]} is already there; name another file")


@dataclass(frozen=True)
class _PictureRows:
    """The rows of pictures of the page."""

    erased: tuple[PictureRow, ...]
    preserved: tuple[PictureRow, ...]
    restored: tuple[PictureRow, ...]


def _picture_rows(
    generator: ImageGenerator, prompt_set: PromptSet, patches: Sequence[EvaluatedPatch], seed: int
) -> _PictureRows:
    terms, classes = [each.term for each in patches], [prompt_set.class_of(each.concept) for each in patches]
    prompts = [prompt_set.prompts(head, name, SHOWN, seed) for head, name in classes]
    free = [name for name in prompt_set.names(OBJECT) if (OBJECT, name) not in classes]
    others = [prompt_set.prompts(OBJECT, name, 1, seed)[0] for name in evenly_spaced(free, SHOWN)]
    generator.expect(2 * (sum(map(len, prompts)) + len(others)) + SHOWN)
    erased: list[PictureRow] = []
    for (_, name), asked in zip(classes, prompts, strict=True):
        erased.append(_row(generator, (), asked, f"{name}: base"))
        erased.append(_row(generator, terms, asked, f"{name}: erased"))
    preserved = [
        _row(generator, (), others, "others: base"),
        _row(generator, terms, others, "others: recipe on"),
    ]
    first = classes[0][1]
    restored = [
        _row(generator, (), prompts[0], f"{first}: base"),
        _row(generator, terms[1:], prompts[0], f"{first}: patch removed"),
    ]
    return _PictureRows(tuple(erased), tuple(preserved), tuple(restored))


def _row(generator: ImageGenerator, terms: Sequence[Term], prompts: Sequence[EvalPrompt], label: str) -> PictureRow:
    pictures = generator.draw(terms, prompts)
    alts = (f"{label}; prompt: {prompt.prompt}; seed {prompt.seed}" for prompt in prompts)
    return PictureRow(label, tuple(Picture(p, alt) for p, alt in zip(pictures, alts, strict=True)))


def numbers_of(record: EvaluationRecord) -> Numbers:
    """The measurements that a record holds."""
    return Numbers([Measurement(r.subject, r.metric, r.value, r.n, r.low, r.high) for r in record.results])


def _page(
    recipe: RecipeRecord,
    subject: Subject,
    runs: Mapping[str, EvaluationRecord],
    numbers: Mapping[str, Numbers],
    rows: _PictureRows,
    provenance: tuple[tuple[str, str], ...],
) -> Report:
    parts: list[Section] = [
        sections.summary(numbers),
        sections.erased(numbers, rows.erased),
        sections.preserved(numbers, rows.preserved),
        sections.restored(numbers, rows.restored),
    ]
    for suite in ("crosstalk", "scale", "probes"):
        if suite in numbers:
            parts.append(getattr(sections, suite)(numbers[suite]))
    parts += [sections.cost(numbers, _patches(subject)), sections.limits()]
    names = ", ".join(patch.concept for patch, _ in subject.entries)
    return Report(
        title=f"Recipe {recipe.name}: what it erases, preserves and restores",
        intro=f"Recipe {recipe.name}, revision {recipe.revision}, applies {len(subject.entries)} patches to the base "
        f"{recipe.base}. Erased are: {names}. Every number says how many pictures it is of, and its 95% interval.",
        sections=tuple(parts),
        provenance=provenance,
        commands=tuple(_command(recipe.name, record) for record in runs.values()),
    )


def _patches(subject: Subject) -> Table:
    rows = tuple(
        (p.concept, p.solver, f"{strength:g}", f"{p.nbytes:,}", f"{p.seconds:.2f} s") for p, strength in subject.entries
    )
    return Table(("concept", "solver", "strength", "bytes", "solved in"), rows, "The patches of the recipe")


def _provenance(
    subject: Subject, runs: Mapping[str, EvaluationRecord], digests: Mapping[str, str]
) -> tuple[tuple[str, str], ...]:
    pairs = list(digests.items())
    for patch, _ in subject.entries:
        settings = _listed(patch.settings)
        pairs.append((f"patch for {patch.concept}", f"{patch.id} ({patch.solver}: {settings}; seed {patch.seed})"))
    for suite, run in runs.items():
        drawn, software = _listed(run.settings["sampler"]), _listed(run.versions)
        how = f"judge {run.judge}; seed {run.seed}; {drawn}; {run.seconds:.0f} s; {software}"
        pairs.append((f"{suite}, {run.at.isoformat(timespec='seconds')} by {run.who}", how))
    return tuple(pairs)


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _command(name: str, run: EvaluationRecord) -> str:
    sampler = run.settings["sampler"]
    chosen = "".join(f" --set '{key}={value}'" for key, value in run.settings["suite"].items() if value != "")
    judge = f" --judge {run.settings['judge']}" if run.settings.get("judge") else ""
    prompts = f" --prompts {run.settings['prompts']}" if run.settings.get("prompts") else ""
    drawn = f" --steps {sampler['steps']} --guidance {sampler['guidance']:g} --seed {run.seed}"
    return f"overpaint evaluate {name} --suite {run.suite}{chosen}{judge}{prompts}{drawn}"


def model_card(name: str, base: str, fingerprint: str, entries: Sequence[tuple[PatchRecord, float]]) -> str:
    """The card of a build, Markdown: what is erased in it, and how well, as measured. No name can break its table."""
    return rendered("card.md.j2", name=name, base=base, fingerprint=fingerprint, entries=entries)


def save_numbers(out: Path, records: Sequence[EvaluationRecord]) -> tuple[Path, ...]:
    """Every number of `records` in `out`'s name with .json and .csv."""
    files = out.with_suffix(".json"), out.with_suffix(".csv")
    runs = [{**asdict(record), "at": record.at.isoformat()} for record in records]
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["suite", "subject", "metric", "value", "low", "high", "n", "judge", "seed"])
    for run in records:
        for r in run.results:
            writer.writerow([run.suite, r.subject, r.metric, r.value, r.low, r.high, r.n, run.judge, run.seed])
    write_over(files[0], (json.dumps(runs, indent=1, ensure_ascii=False) + "\n").encode())
    write_over(files[1], table.getvalue().encode())
    return files
