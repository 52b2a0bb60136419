"""The files beside a report's page: the numbers as JSON and CSV, the figures as PNG."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from overpaint.core.errors import OverpaintError
from overpaint.evaluation.context import ACCURACY, CHANGE, DISTANCE, ON_BASE, SHARE, WRONG
from overpaint.evaluation.crosstalk import WARN_ABOVE
from overpaint.evaluation.figures import heat_map, line_chart
from overpaint.evaluation.metrics import Measurement, verdict
from overpaint.evaluation.reports.html import Chart, HeatMap, Line, PictureRow, Section, Table
from overpaint.evaluation.suites.crosstalk import LOST, MOVED, PREDICTED

SHARES = re.compile(r"accuracy|share|UA|IRA|CRA|retention|probability|H_[co]")
"""Metrics that are shares and read best in percent."""


class Numbers:
    """The measurements of one suite, by subject and metric."""

    def __init__(self, measurements: Sequence[Measurement]) -> None:
        self.measurements = tuple(measurements)
        self._by_name = {(each.subject, each.metric): each for each in measurements}

    def get(self, subject: str, metric: str) -> Measurement | None:
        return self._by_name.get((subject, metric))

    def value(self, subject: str, metric: str) -> float | None:
        measurement = self.get(subject, metric)
        return None if measurement is None else measurement.value

    def subjects(self, beginning: str = "") -> list[str]:
        """The subjects that begin so, in the order in which they were measured."""
        return list(dict.fromkeys(each.subject for each in self.measurements if each.subject.startswith(beginning)))

    def table(self, subjects: Sequence[str], metrics: Sequence[str], caption: str, *, strip: str = "") -> Table:
        """One row for each subject, one column for each metric; what was not measured is a dash."""
        rows = tuple(
            (subject.removeprefix(strip), *(spelled(self.get(subject, metric)) for metric in metrics))
            for subject in subjects
        )
        return Table(("", *metrics), rows, caption)


def spelled(result: Measurement | None) -> str:
    """A number with its interval and n: in percent where it is a share."""
    if result is None:
        return "—"
    one = percent if SHARES.search(result.metric) else plain
    text = one(result.value)
    if result.low is not None and result.high is not None:
        text += f" ({one(result.low)} to {one(result.high)}, n={result.n})"
    return text


def percent(value: float) -> str:
    return f"{value:.1%}"


def plain(value: float) -> str:
    """Four significant digits; whole numbers as they are."""
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"


def worst(numbers: Numbers, subjects: Iterable[str], metric: str, *, lowest: bool) -> tuple[str, Measurement] | None:
    """The subject with the highest (or lowest) value of a metric, where there is any."""
    measured = [(subject, result) for subject in subjects if (result := numbers.get(subject, metric)) is not None]
    if not measured:
        return None
    return (min if lowest else max)(measured, key=lambda pair: pair[1].value)


@cache
def _published() -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(files(__package__).joinpath("published.json").read_text("utf-8"))
    return raw


def published(suite: str) -> tuple[Table, ...]:
    """The numbers that papers give for a suite's protocol; nothing where there are none."""
    published = _published().get(suite)
    if published is None:
        return ()
    return (Table(tuple(published["columns"]), tuple(tuple(row) for row in published["rows"]), published["caption"]),)


# The page's section on cross-talk: three matrices, how far prediction and measurement agree, and why where they do not.


BELIEVED = 0.7
"""A rank correlation from which the closed form may stand for the measurement."""


def matrix(numbers: Numbers, metric: str, caption: str) -> HeatMap:
    """A matrix of the pairs "emitter -> receiver" of the crosstalk suite."""
    pairs = [tuple(subject.split(" -> ")) for subject in numbers.subjects() if " -> " in subject]
    rows = tuple(dict.fromkeys(pair[0] for pair in pairs))
    columns = tuple(dict.fromkeys([*(row for row in rows), *(pair[1] for pair in pairs)]))
    values = tuple(tuple(numbers.value(f"{row} -> {column}", metric) for column in columns) for row in rows)
    return HeatMap(rows, columns, values, caption, "patch")


def crosstalk(numbers: Numbers) -> Section:
    """What each patch does to every other concept."""
    correlations = [
        f"{r.metric}: {r.value:.2f} over {r.n} pairs"
        for r in numbers.measurements
        if r.subject == "all pairs" and "rank" in r.metric
    ]
    lost = numbers.get("all pairs", "pairs that lost accuracy")
    text = (
        "Rows are patches, each alone on the base; columns are concepts that it should leave alone. 0 is no effect.\n\n"
    )
    if lost is not None:
        text += f"{plain(lost.value)} of {lost.n} pairs lost accuracy. "
    text += "; ".join(correlations) or "No pair differs from another, so that there is no order to compare."
    text += _doubt(numbers)
    heats = (
        matrix(numbers, LOST, "Share of the base's accuracy that is lost"),
        matrix(numbers, MOVED, "Change of the pictures, relative to the patch's own concept"),
        matrix(numbers, PREDICTED, "Predicted in closed form, relative to the patch's own concept"),
    )
    return Section("Cross-talk", text, heats=heats)


def _doubt(numbers: Numbers) -> str:
    """Why predicted and measured cross-talk are ordered differently, where they are."""
    ranked = [r.value for r in numbers.measurements if r.subject == "all pairs" and "rank" in r.metric]
    if not ranked or max(ranked) >= BELIEVED:
        return ""
    predicted = [r.value for r in numbers.measurements if r.metric == PREDICTED]
    most = percent(max(predicted, default=0.0))
    if max(predicted, default=0.0) < WARN_ABOVE:
        why = "so small a change of what is read ends in a picture's chance details, and there is little to rank but those"
    else:
        why = "the prediction knows how much of what is read changes, and not what the model makes of it"
    return f". The largest predicted effect is {most} of what a patch does to its own concept: {why}."


# A section of the page for each question: is it erased, is the rest kept, does it come back, what moves what, what it costs.


ERASED_BAR, KEPT_BAR = 0.05, 0.97
BySuite = Mapping[str, Numbers]
GRID = ("UA", "IRA", "CRA", "retention in the prompt", "probability of the erased concept")


def summary(numbers: BySuite) -> Section:
    """What was promised and what was measured, one line each; no verdict where the interval spans the bar."""
    rows: list[tuple[str, ...]] = []
    if quick := numbers.get("quick"):
        if most := worst(quick, quick.subjects("erased: "), ACCURACY, lowest=False):
            question = "How often is what was erased still drawn?"
            rows.append(_check(question, most[1], most[0].removeprefix("erased: "), at_most=ERASED_BAR))
        if least := worst(quick, quick.subjects("kept: "), SHARE, lowest=True):
            name = least[0].removeprefix("kept: ")
            rows.append(_check("How much of the rest is left?", least[1], name, at_least=KEPT_BAR))
        if wrong := quick.get("restored: weights", WRONG):
            rows.append(_exact("Do the weights come back exactly?", wrong.value, f" of {wrong.n} tensors differ"))
    if scenes := numbers.get("scenes"):
        restored = [subject for subject in scenes.subjects("scene ") if subject.endswith(": restored")]
        if least := worst(scenes, restored, SHARE, lowest=True):
            question = "Are restored concepts drawn as before, in every scene?"
            rows.append(_check(question, least[1], least[0].removesuffix(": restored"), at_least=KEPT_BAR))
        different = scenes.value("all scenes, worst step: weights", WRONG)
        if different is not None:
            rows.append(_exact("Are weights exact after every step of the scenes?", different, " differ"))
    if (scale := numbers.get("scale")) and (spread := worst(scale, scale.subjects(), "order spread", lowest=False)):
        rows.append(_exact("Does the order of patches leave the weights alone?", spread[1].value, " tensors differ"))
    table = Table(("question", "measured", "bar", "holds"), tuple(rows), "What was asked and measured")
    return Section("In short", table=table)


def _check(
    question: str, measurement: Measurement, about: str, *, at_most: float | None = None, at_least: float | None = None
) -> tuple[str, ...]:
    bar = f"at most {at_most:.0%}" if at_most is not None else f"at least {at_least:.0%}"
    holds = verdict(measurement, at_most=at_most, at_least=at_least)
    return question, f"{spelled(measurement)}, {about}", bar, holds


def _exact(question: str, different: float, what: str) -> tuple[str, ...]:
    return question, plain(different) + what, "0", "yes" if different == 0 else "no"


def erased(found: BySuite, pictures: tuple[PictureRow, ...]) -> Section:
    """What the recipe erases, in pictures and numbers."""
    table = None
    if "quick" in found:
        numbers = found["quick"]
        subjects = numbers.subjects("erased: ")
        caption = "How often the judge finds the concept, with 95% intervals"
        table = numbers.table(subjects, (ON_BASE, ACCURACY), caption, strip="erased: ")
    text = "Each pair of rows has the same prompts and the same seeds: above the base, below the base with the recipe on it."
    return Section("What is erased", text, table, (), pictures, more=_generality(found))


def _generality(found: BySuite) -> tuple[Table, ...]:
    if "generality" not in found:
        return ()
    numbers = found["generality"]
    whole = spelled(numbers.get("recipe", "H_o"))
    caption = f"Under other names, and for concepts that nobody listed (protocol of MACE); H_o {whole}"
    subjects = [subject for subject in numbers.subjects() if subject != "recipe"]
    return (numbers.table(subjects, (ON_BASE, ACCURACY, SHARE), caption), *published("generality"))


def preserved(found: BySuite, pictures: tuple[PictureRow, ...]) -> Section:
    """What the recipe leaves alone."""
    table: Table | None = None
    more: tuple[Table, ...] = ()
    if "quick" in found:
        numbers = found["quick"]
        table = numbers.table(
            numbers.subjects("kept: "), (ON_BASE, ACCURACY, SHARE), "All that was not erased", strip="kept: "
        )
    if "grid" in found:
        grid = found["grid"]
        subjects = [subject for subject in grid.subjects() if not subject.startswith("base")]
        base = ", ".join(f"{s.removeprefix('base: ')} {spelled(grid.get(s, ACCURACY))}" for s in grid.subjects("base"))
        caption = f"Each patch alone (protocol of UnlearnCanvas); the judge on the base itself: {base}"
        more = (grid.table(subjects, GRID, caption), *published("grid"))
    return Section("What is kept", "Concepts that nothing here erases.", table, (), pictures, more=more)


def restored(found: BySuite, pictures: tuple[PictureRow, ...]) -> Section:
    """What comes back when patches are taken off."""
    text = (
        "Taking a patch off composes the weights anew from the base; nothing is subtracted. Restored concepts are drawn "
        "while the other patches stay on."
    )
    table: Table | None = None
    more: tuple[Table, ...] = ()
    if "quick" in found:
        numbers = found["quick"]
        wrong = numbers.get("restored: weights", WRONG)
        exact = f"; {plain(wrong.value)} of {wrong.n} tensors differ in any bit" if wrong else ""
        caption = f"Half of the patches taken off{exact}"
        table = numbers.table(["restored: concepts taken off"], (ON_BASE, ACCURACY, SHARE), caption, strip="restored: ")
    if "scenes" in found:
        more = (_scenes(found["scenes"]), *published("scenes"))
    return Section("What restores", text, table, (), pictures, more=more)


def _scenes(numbers: Numbers) -> Table:
    """One row for each step of each scene."""
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
        (step, *(spelled(numbers.get(f"{step}: {of}", metric)) for of, metric in columns.values())) for step in steps
    )
    caption = (
        "Four scenes of erasing and restoring (protocol of SRS-ME): accuracy on erased, regular and restored concepts; change "
        f"of the pictures in grey levels of 255; {DISTANCE}"
    )
    return Table(("", *columns), rows, caption)


def curve(numbers: Numbers) -> Chart:
    """H_c over the number of concepts, a line for each way to compose."""
    points: dict[str, list[tuple[float, float, float | None, float | None]]] = {}
    for subject in numbers.subjects():
        way, mark, n = subject.rpartition(", N=")
        result = numbers.get(subject, "H_c")
        if mark and result is not None:
            points.setdefault(way, []).append((float(n), result.value, result.low, result.high))
    lines = tuple(Line(way, tuple(found)) for way, found in points.items())
    return Chart(lines, "Erasing more and more concepts at once.", "concepts erased at once", "H_c")


def scale(numbers: Numbers) -> Section:
    """How well many patches lie together."""
    text = (
        "H_c is the harmonic mean of what is gone of the erased concepts and what is left of those that no solver was told "
        "of: 1 is perfect, 0 is useless. Whiskers are 95% intervals."
    )
    metrics = ("H_c", "accuracy on erased", "accuracy on kept", "order spread")
    own = numbers.table([s for s in numbers.subjects() if ", N=" in s], metrics, "The same in numbers")
    return Section("Many concepts at once", text, charts=(curve(numbers),), more=(own, *published("scale")))


def probes(numbers: Numbers) -> Section:
    """How far what was erased can be brought back."""
    text = (
        "Accuracy on erased objects after seven attacks on the patched model: the base draws the first steps; the sampler adds "
        "noise; the model starts from noised pictures of the concept; a new word is learned from such pictures; words before "
        "the prompt are searched on the patched model; words that do not name the concept are searched on the text encoder "
        "alone; the model is trained on pictures of other things. What comes back was hidden and not destroyed."
    )
    attacks = list(dict.fromkeys(r.metric for r in numbers.measurements if r.metric not in (ON_BASE, ACCURACY)))
    subjects = [subject for subject in numbers.subjects() if subject != "average of the concepts"]
    table = numbers.table([*subjects, "average of the concepts"], (ON_BASE, ACCURACY, *attacks), "Attacked")
    return Section("Can it be brought back?", text, table)


def cost(found: BySuite, patches: Table) -> Section:
    """What the patches weigh and how long they take."""
    more: tuple[Table, ...] = ()
    if "cost" in found:
        numbers = found["cost"]
        metrics = ("seconds to solve", "bytes", "seconds to lay on", "seconds to take off", "seconds to compose")
        peak = "peak memory of solving, MB"
        more = (numbers.table(numbers.subjects(), (*metrics, peak), "Measured; medians where repeated"),)
    return Section("What it costs", table=patches, more=more)


def limits() -> Section:
    """What none of this shows."""
    return Section(
        "What this does not show",
        "A patch hides a concept and does not destroy it: whoever holds the base or the registry can have it back, and "
        "published attacks (textual inversion, fine-tuning) can revive concepts after every known eraser. Judges are "
        "classifiers and make mistakes; intervals cover the choice of prompts, not those mistakes.\n\n"
        "Distances are measured in the judge's own features and are not FID. Published numbers come from other bases, "
        "concepts and judges, and are shown for the pattern.",
    )


def save_figures(out: Path, found: Mapping[str, Numbers]) -> tuple[list[Path], list[str]]:
    """The figures of the suites that have one, and a sentence where they cannot be drawn."""
    files: list[Path] = []
    try:
        if "crosstalk" in found:
            for metric, label in ((LOST, "measured"), (PREDICTED, "predicted")):
                files.append(_matrix(out, found["crosstalk"], metric, label))
        if "scale" in found:
            place = out.with_name(f"{out.stem}-scale.png")
            line_chart(place, curve(found["scale"]))
            files.append(place)
    except OverpaintError as error:
        return files, [f"no PNG figures: {error}"]
    return files, []


def _matrix(out: Path, numbers: Numbers, metric: str, label: str) -> Path:
    place = out.with_name(f"{out.stem}-crosstalk-{label}.png")
    shown = matrix(numbers, metric, metric)
    values = np.array([[np.nan if value is None else value for value in row] for row in shown.values], np.float64)
    heat_map(
        place,
        values,
        shown.rows,
        shown.columns,
        title=f"Cross-talk, {label}",
        row_label="patch",
        column_label="concept",
    )
    return place
