"""A section of the page for each question: is it erased, is the rest kept, does it come back, what moves what, what it costs."""

from __future__ import annotations

from collections.abc import Mapping

from overpaint.evaluation.bench import ACCURACY, CHANGE, DISTANCE, ON_BASE, SHARE, WRONG
from overpaint.evaluation.graphics import Chart, Line
from overpaint.evaluation.report import PictureRow, Section, Table
from overpaint.reporting.numbers import Numbers, percent, plain, published, spelled, worst

ERASED_BAR, KEPT_BAR = 0.05, 0.97
Found = Mapping[str, Numbers]
GRID = ("UA", "IRA", "CRA", "retention in the prompt", "probability of the erased concept")


def summary(found: Found) -> Section:
    """What was promised and what was found, one line each."""
    rows = [row for row in (*_quick_checks(found), *_scene_checks(found), *_scale_check(found)) if row]
    return Section(
        "In short", table=Table(("question", "found", "bar", "holds"), tuple(rows), "What was asked and found")
    )


def _quick_checks(found: Found) -> list[tuple[str, str, str, str]]:
    if "quick" not in found:
        return []
    numbers, rows = found["quick"], []
    most = worst(numbers, numbers.subjects("erased: "), ACCURACY, lowest=False)
    if most:
        name = most[0].removeprefix("erased: ")
        held = _yes(most[1].value <= ERASED_BAR)
        rows.append(("How often is what was erased still drawn?", f"{spelled(most[1])}, {name}", "at most 5%", held))
    least = worst(numbers, numbers.subjects("kept: "), SHARE, lowest=True)
    if least:
        held = _yes(least[1].value >= KEPT_BAR)
        rows.append(("How much of the rest is left?", f"{spelled(least[1])}, {least[0][6:]}", "at least 97%", held))
    wrong = numbers.get("restored: weights", WRONG)
    if wrong:
        says = f"{plain(wrong.value)} of {wrong.n} tensors differ"
        rows.append(("Do the weights come back exactly?", says, "0", _yes(wrong.value == 0)))
    return rows


def _scene_checks(found: Found) -> list[tuple[str, str, str, str]]:
    if "scenes" not in found:
        return []
    numbers, rows, all_scenes = found["scenes"], [], "all scenes, worst step: "
    left = numbers.value(f"{all_scenes}restored", SHARE)
    if left is not None:
        rows.append(
            (
                "Are restored concepts drawn as before, in every scene?",
                percent(left),
                "at least 97%",
                _yes(left >= KEPT_BAR),
            )
        )
    wrong = numbers.value(f"{all_scenes}weights", WRONG)
    if wrong is not None:
        rows.append(
            ("Are weights exact after every step of the scenes?", f"{plain(wrong)} differ", "0", _yes(wrong == 0))
        )
    return rows


def _scale_check(found: Found) -> list[tuple[str, str, str, str]]:
    if "scale" not in found:
        return []
    numbers = found["scale"]
    spread = worst(numbers, numbers.subjects(), "order spread", lowest=False)
    if spread is None:
        return []
    return [
        (
            "Does the order of patches matter?",
            f"{plain(spread[1].value)} tensors differ",
            "0",
            _yes(spread[1].value == 0),
        )
    ]


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def erased(found: Found, columns: tuple[str, ...], pictures: tuple[PictureRow, ...]) -> Section:
    """What the recipe erases, in pictures and numbers."""
    table = None
    if "quick" in found:
        numbers = found["quick"]
        subjects = numbers.subjects("erased: ")
        caption = "How often the judge finds the concept, with 95% intervals"
        table = numbers.table(subjects, (ON_BASE, ACCURACY), caption, strip="erased: ")
    text = "Each pair of rows has the same prompts and the same seeds: above the base, below the base with the recipe on it."
    return Section("What is erased", text, table, columns, pictures, more=_generality(found))


def _generality(found: Found) -> tuple[Table, ...]:
    if "generality" not in found:
        return ()
    numbers = found["generality"]
    whole = spelled(numbers.get("recipe", "H_o"))
    caption = f"Under other names, and for concepts that nobody listed (protocol of MACE); H_o {whole}"
    subjects = [subject for subject in numbers.subjects() if subject != "recipe"]
    return (numbers.table(subjects, (ON_BASE, ACCURACY, SHARE), caption), *published("generality"))


def kept(found: Found, columns: tuple[str, ...], pictures: tuple[PictureRow, ...]) -> Section:
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
    return Section("What is kept", "Concepts that nothing here erases.", table, columns, pictures, more=more)


def restored(found: Found, columns: tuple[str, ...], pictures: tuple[PictureRow, ...]) -> Section:
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
    return Section("What restores", text, table, columns, pictures, more=more)


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
        "Accuracy on erased objects after four attacks on the patched model: the base draws the first steps; the sampler adds "
        "noise; a new word is learned from pictures of the concept; the model is trained on pictures of other things. What "
        "comes back was hidden and not destroyed."
    )
    attacks = list(dict.fromkeys(r.metric for r in numbers.record.results if r.metric not in (ON_BASE, ACCURACY)))
    subjects = [subject for subject in numbers.subjects() if subject != "average of the concepts"]
    table = numbers.table([*subjects, "average of the concepts"], (ON_BASE, ACCURACY, *attacks), "Attacked")
    return Section("Can it be brought back?", text, table)


def cost(found: Found, patches: Table) -> Section:
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
