"""Pages about a recipe: the report of what was measured, and the model card of a build.

A report has the latest run of every suite, pictures for the same seeds, and where it all comes from.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overpaint.bases.loading import resolve_device
from overpaint.core.atomic import require_parent, write_over
from overpaint.core.encoding import evenly_spaced
from overpaint.core.errors import AlreadyExists, OverpaintError
from overpaint.core.reporting import Progress, html_table, silent
from overpaint.evaluation.context import ACCURACY, CHANGE, DISTANCE, ON_BASE, SHARE, WRONG, EvaluatedPatch
from overpaint.evaluation.images import ImageGenerator, Sampler
from overpaint.evaluation.metrics import Measurement, verdict
from overpaint.evaluation.prompts import OBJECT, EvalPrompt, PromptSet
from overpaint.evaluation.report_page import (
    Numbers,
    Picture,
    PictureRow,
    Report,
    Section,
    Table,
    as_text,
    plain,
    published,
    rendered,
    save_figures,
    write_report,
)
from overpaint.evaluation.suites import ERASED_BAR, KEPT_BAR, SUITES, suite_class
from overpaint.patches.compose import Term
from overpaint.registry.records import EvaluationRecord, PatchRecord, RecipeRecord
from overpaint.workspace.evaluating import Subject, image_cache, prompt_set_of

if TYPE_CHECKING:
    from overpaint.workspace.opened import OpenRegistry

SHOWN = 6
"""Pictures in a row."""
BySuite = Mapping[str, Numbers]
SCENES = {"scenes": "in sentences", "scenes_by_name": "by bare names"}
"""Suites that play the scenes of SRS-ME, with how they ask for concepts."""
GRID = ("UA", "IRA", "CRA", "retention in the prompt", "probability of the erased concept")


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
    page = _page(registry.recipe(name), subject, runs, numbers, rows, provenance)
    write_report(out, page)
    figures, notices = save_figures(out, page.sections)
    return Reported((out, *save_numbers(out, records), *figures), notices)


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
    own = ((suite_class(suite), numbers[suite]) for suite in SUITES if suite in numbers)
    parts = (
        summary(numbers),
        _erased(numbers, rows.erased),
        _preserved(numbers, rows.preserved),
        _restored(numbers, rows.restored),
        *(suite.section(measured) for suite, measured in own if suite.heading),
        _cost(numbers, _patches(subject)),
        _limits(),
    )
    names = ", ".join(patch.concept for patch, _ in subject.entries)
    return Report(
        title=f"Recipe {recipe.name}: what it erases, preserves and restores",
        intro=f"Recipe {recipe.name}, revision {recipe.revision}, applies {len(subject.entries)} patches to the base "
        f"{recipe.base}. Erased are: {names}. Every number says how many pictures it is of, and its 95% interval.",
        sections=parts,
        provenance=provenance,
        commands=tuple(_command(recipe.name, record) for record in runs.values()),
    )


def summary(numbers: BySuite) -> Section:
    """What was promised and what was measured, one line each; no verdict where the interval spans the bar."""
    rows: list[tuple[str, ...]] = []
    if quick := numbers.get("quick"):
        if most := _worst(quick, quick.subjects("erased: "), ACCURACY, lowest=False):
            question = "How often is what was erased still drawn?"
            rows.append(_check(question, most[1], most[0].removeprefix("erased: "), at_most=ERASED_BAR))
        if least := _worst(quick, quick.subjects("kept: "), SHARE, lowest=True):
            name = least[0].removeprefix("kept: ")
            rows.append(_check("How much of the rest is left?", least[1], name, at_least=KEPT_BAR))
        if wrong := quick.get("restored: weights", WRONG):
            rows.append(_exact("Do the weights come back exactly?", wrong.value, f" of {wrong.n} tensors differ"))
    for scenes, asked in ((numbers[suite], asked) for suite, asked in SCENES.items() if suite in numbers):
        restored = [subject for subject in scenes.subjects("scene ") if subject.endswith(": restored")]
        if least := _worst(scenes, restored, SHARE, lowest=True):
            question = f"Are restored concepts drawn as before, in every scene, asked {asked}?"
            rows.append(_check(question, least[1], least[0].removesuffix(": restored"), at_least=KEPT_BAR))
        different = scenes.value("all scenes, worst step: weights", WRONG)
        if different is not None:
            rows.append(
                _exact(f"Are weights exact after every step of the scenes, asked {asked}?", different, " differ")
            )
    if (scale := numbers.get("scale")) and (spread := _worst(scale, scale.subjects(), "order spread", lowest=False)):
        rows.append(_exact("Does the order of patches leave the weights alone?", spread[1].value, " tensors differ"))
    table = Table(("question", "measured", "bar", "holds"), tuple(rows), "What was asked and measured")
    return Section("In short", table=table)


def _check(
    question: str, measurement: Measurement, about: str, *, at_most: float | None = None, at_least: float | None = None
) -> tuple[str, ...]:
    bar = f"at most {at_most:.0%}" if at_most is not None else f"at least {at_least:.0%}"
    holds = verdict(measurement, at_most=at_most, at_least=at_least)
    return question, f"{as_text(measurement)}, {about}", bar, holds


def _exact(question: str, different: float, what: str) -> tuple[str, ...]:
    return question, plain(different) + what, "0", "yes" if different == 0 else "no"


def _erased(by_suite: BySuite, pictures: tuple[PictureRow, ...]) -> Section:
    """What the recipe erases, in pictures and numbers."""
    table = None
    if "quick" in by_suite:
        numbers = by_suite["quick"]
        subjects = numbers.subjects("erased: ")
        caption = "How often the judge finds the concept, with 95% intervals"
        table = numbers.table(subjects, (ON_BASE, ACCURACY), caption, strip="erased: ")
    text = "Each pair of rows has the same prompts and the same seeds: above the base, below the base with the recipe on it."
    return Section("What is erased", text, table, (), pictures, more=_generality(by_suite))


def _generality(by_suite: BySuite) -> tuple[Table, ...]:
    if "generality" not in by_suite:
        return ()
    numbers = by_suite["generality"]
    whole = as_text(numbers.get("recipe", "H_o"))
    caption = f"Under other names, and for concepts that nobody listed (protocol of MACE); H_o {whole}"
    subjects = [subject for subject in numbers.subjects() if subject != "recipe"]
    return (numbers.table(subjects, (ON_BASE, ACCURACY, SHARE), caption), *published("generality"))


def _preserved(by_suite: BySuite, pictures: tuple[PictureRow, ...]) -> Section:
    """What the recipe leaves alone."""
    table: Table | None = None
    more: tuple[Table, ...] = ()
    if "quick" in by_suite:
        numbers = by_suite["quick"]
        table = numbers.table(
            numbers.subjects("kept: "), (ON_BASE, ACCURACY, SHARE), "All that was not erased", strip="kept: "
        )
    if "grid" in by_suite:
        grid = by_suite["grid"]
        subjects = [subject for subject in grid.subjects() if not subject.startswith("base")]
        base = ", ".join(f"{s.removeprefix('base: ')} {as_text(grid.get(s, ACCURACY))}" for s in grid.subjects("base"))
        caption = f"Each patch alone (protocol of UnlearnCanvas); the judge on the base itself: {base}"
        more = (grid.table(subjects, GRID, caption), *published("grid"))
    return Section("What is kept", "Concepts that nothing here erases.", table, (), pictures, more=more)


def _restored(by_suite: BySuite, pictures: tuple[PictureRow, ...]) -> Section:
    """What comes back when patches are removed."""
    text = (
        "Removing a patch composes the weights again from the base; nothing is subtracted. Restored concepts are drawn "
        "while the other patches stay."
    )
    table: Table | None = None
    more = tuple(_scenes(by_suite[suite], asked) for suite, asked in SCENES.items() if suite in by_suite)
    if more:
        more += published("scenes_by_name")
    if "quick" in by_suite:
        numbers = by_suite["quick"]
        wrong = numbers.get("restored: weights", WRONG)
        exact = f"; {plain(wrong.value)} of {wrong.n} tensors differ in any bit" if wrong else ""
        caption = f"Half of the patches removed{exact}"
        table = numbers.table(["restored: concepts taken off"], (ON_BASE, ACCURACY, SHARE), caption, strip="restored: ")
    return Section("What restores", text, table, (), pictures, more=more)


def _scenes(numbers: Numbers, asked: str) -> Table:
    """One row for each step of each scene; `asked` says how concepts were asked for."""
    columns = {
        "erased": ("erased", ACCURACY),
        "regular": ("regular", ACCURACY),
        "restored": ("restored", ACCURACY),
        "restored: change": ("restored", CHANGE),
        "restored: distance": ("restored", DISTANCE),
        "tensors that differ": ("weights", WRONG),
    }
    steps = list(dict.fromkeys(subject.rpartition(": ")[0] for subject in numbers.subjects("scene ")))
    rows = tuple(
        (step, *(as_text(numbers.get(f"{step}: {of}", metric)) for of, metric in columns.values())) for step in steps
    )
    caption = (
        f"Four scenes of erasing and restoring (protocol of SRS-ME), asked {asked}: accuracy on erased, regular and restored "
        f"concepts; change of the pictures in grey levels of 255; {DISTANCE}"
    )
    return Table(("", *columns), rows, caption)


def _cost(by_suite: BySuite, patches: Table) -> Section:
    """What the patches weigh and how long they take."""
    more: tuple[Table, ...] = ()
    if "cost" in by_suite:
        numbers = by_suite["cost"]
        metrics = ("seconds to solve", "bytes", "seconds to lay on", "seconds to take off", "seconds to compose")
        peak = "peak memory of solving, MB"
        more = (numbers.table(numbers.subjects(), (*metrics, peak), "Measured; medians where repeated"),)
    return Section("What it costs", table=patches, more=more)


def _limits() -> Section:
    """What none of this shows."""
    return Section(
        "What this does not show",
        "A patch hides a concept and does not destroy it: whoever holds the base or the registry can have it back, and "
        "published attacks (textual inversion, fine-tuning) can revive concepts after every known eraser. Judges are "
        "classifiers and make mistakes; intervals cover the choice of prompts, not those mistakes.\n\n"
        "Distances are measured in the judge's own features and are not FID. Published numbers come from other bases, "
        "concepts and judges, and are shown for the pattern.",
    )


def _worst(numbers: Numbers, subjects: Iterable[str], metric: str, *, lowest: bool) -> tuple[str, Measurement] | None:
    """The subject with the highest (or lowest) value of a metric, where there is any."""
    measured = [(subject, result) for subject in subjects if (result := numbers.get(subject, metric)) is not None]
    if not measured:
        return None
    return (min if lowest else max)(measured, key=lambda pair: pair[1].value)


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
