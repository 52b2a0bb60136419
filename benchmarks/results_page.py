"""`docs/results.md` from kept evaluations: one table for each suite, the papers' numbers below it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from overpaint.evaluation.context import ACCURACY, CHANGE, DISTANCE, SHARE, WRONG
from overpaint.evaluation.crosstalk import LOST, MOVED, PREDICTED
from overpaint.evaluation.metrics import plain_words, rank_correlation
from overpaint.evaluation.report_page import Numbers, Table, as_text, percent, plain, published
from overpaint.evaluation.suites import SUITES
from overpaint.registry.records import EvaluationRecord
from overpaint.solvers import SOLVERS
from overpaint.workspace.report import numbers_of

INTRO = """# Results on the embedded base

Written by `python -m benchmarks.evaluation`; do not edit. Every suite is run on the embedded base by the
judge that ships with it, a small classifier trained on drawings alone. Brackets are 95% intervals over prompts and the number of
pictures. Every solver is handed the twelve concepts of this registry and preserves them as its method says; patches
of one recipe are summed. Only in "More and more concepts" do all solvers but `separable` and `sepme` work alone, as published.

Published numbers stand below each table. They come from other bases, concepts, judges and numbers of pictures, and are there for
the pattern, not for the digits. Distances are Frechet distances in the judge's own features, not FID. A patch hides a concept and
does not destroy it; how far attacks bring it back stands below as it was measured."""
OLDER = """**Measured on an earlier embedded base**, with another judge than the one that ships now: version 0.1 drew 50
objects in 6 styles from narrower text. [What solvers do on today's](solvers.md)."""
NAMED = Mapping[str, Numbers]
ELSEWHERE = {"scale": "its curve, over 32 concepts and with the patches of that table, is in solvers.md"}
"""Suites that are run for several solvers at once, and where their numbers stand."""


def results_page(records: Sequence[EvaluationRecord], failed: Mapping[str, str], judge: str = "") -> str:
    """The page, Markdown. It says so where records are of another judge than `judge`, the name of the one that ships now."""
    blocks = [INTRO, *([OLDER] if judge and any(record.judge != judge for record in records) else [])]
    tables_of = {
        "quick": ("Erased, kept, restored", _quick),
        "grid": ("Styles x objects, one patch at a time (protocol of UnlearnCanvas)", _grid),
        "generality": ("Synonyms, and concepts that nobody listed (protocol of MACE)", _generality),
        "scenes": ("Erase, restore, erase more (protocol of SRS-ME), asked in sentences", _scenes),
        "scenes_by_name": ("Erase, restore, erase more (protocol of SRS-ME), asked by bare names", _scenes),
        "scale": ("More and more concepts at once", _scale),
        "crosstalk": ("Cross-talk, measured and predicted", _crosstalk),
        "probes": ("Can it be brought back?", _probes),
        "cost": ("Cost", _cost),
    }
    for suite in SUITES:
        heading, tables = tables_of.get(suite, (suite, _every_number))
        found = {record.recipe or "": numbers_of(record) for record in records if record.suite == suite}
        if found:
            blocks += [f"## {heading}", *(markdown(table) for table in (*tables(found), *published(suite)))]
    if left_out := {**_missing(records), **failed}:
        blocks += ["## Not run", "\n".join(f"- {name}: {why}" for name, why in left_out.items())]
    return "\n\n".join([*blocks, _provenance(records)]) + "\n"


def _every_number(found: NAMED) -> Iterable[Table]:
    """Of a suite without a table of its own: every number of every recipe."""
    for name, numbers in found.items():
        yield numbers.table(numbers.subjects(), numbers.metrics(), name)


def _missing(records: Sequence[EvaluationRecord]) -> dict[str, str]:
    """What no number stands for: suites, solvers, and solvers within a suite."""
    ran: dict[str, set[str]] = {suite: set() for suite in SUITES}
    for record in records:
        ran.setdefault(record.suite, set()).add((record.recipe or "").rpartition("-")[0])
    missing = {
        f"solver `{s}`": "in no suite yet; see solvers.md" for s in SOLVERS if not any(s in k for k in ran.values())
    }
    for suite, solvers in ran.items():
        absent = [solver for solver in SOLVERS if solver not in solvers]
        if not solvers:
            missing[f"suite `{suite}`"] = ELSEWHERE.get(suite, "no solver was run through it yet")
        elif absent and suite not in ELSEWHERE:
            missing[f"suite `{suite}`"] = f"not yet with {', '.join(absent)}"
    return missing


def _quick(found: NAMED) -> Iterable[Table]:
    rows = []
    for name, numbers in found.items():
        erased = [numbers.value(s, ACCURACY) or 0.0 for s in numbers.subjects("erased: ")]
        worst, mean = max(erased), sum(erased) / len(erased)
        kept = (as_text(numbers.get(f"kept: other {what}", SHARE)) for what in ("objects", "styles"))
        wrong = numbers.value("restored: weights", WRONG) or 0.0
        back = as_text(numbers.get("restored: concepts taken off", SHARE))
        rows.append((name, percent(mean), percent(worst), *kept, back, plain(wrong)))
    columns = (
        "recipe",
        "erased: mean",
        "erased: worst",
        "other objects left",
        "other styles left",
        "restored",
        "wrong tensors",
    )
    yield Table(columns, tuple(rows), "Six concepts at once; 'left' and 'restored' are shares of the base's accuracy.")


def _grid(found: NAMED) -> Iterable[Table]:
    metrics = ("UA", "IRA", "CRA", "retention in the prompt", "probability of the erased concept")
    average = "average of the patches"
    rows = [(name, *(as_text(n.get(average, metric)) for metric in metrics)) for name, n in found.items()]
    base = next(iter(found.values()))
    judged = ", ".join(f"{s.removeprefix('base: ')} {as_text(base.get(s, ACCURACY))}" for s in base.subjects("base"))
    yield Table(
        ("solver", *metrics), tuple(rows), f"Averages over six patches. The judge on the base itself: {judged}."
    )


def _generality(found: NAMED) -> Iterable[Table]:
    parts = (
        ("erased objects: Acc_e", ACCURACY),
        ("other objects: Acc_s", ACCURACY),
        ("synonyms of erased objects: Acc_g", ACCURACY),
        ("recipe", "H_o"),
        ("other objects the solvers were told of", SHARE),
        ("other objects the solvers never heard of", SHARE),
    )
    columns = ("recipe", "Acc_e", "Acc_s", "Acc_g", "H_o", "known: left", "not known: left")
    rows = [(name, *(as_text(n.get(subject, metric)) for subject, metric in parts)) for name, n in found.items()]
    yield Table(columns, tuple(rows), "All patches at once.")


def _scenes(found: NAMED) -> Iterable[Table]:
    steps = (("scene 1, t0", ("erased", "regular")), ("scene 1, t2", ("erased", "restored", "regular")))
    columns = ["recipe", *(f"{step[-2:]} {what}" for step, whats in steps for what in whats)]
    rows, worst = [], []
    for name, n in found.items():
        rows.append((name, *(as_text(n.get(f"{step}: {what}", ACCURACY)) for step, whats in steps for what in whats)))
        last = "scene 1, t2: restored"
        spelt = [_shown(n.value(f"all scenes, worst step: {what}", metric), metric) for what, metric in _WORST]
        worst.append((name, *spelt, as_text(n.get(last, DISTANCE))))
    yield Table(tuple(columns), tuple(rows), "Scene 1: all erased (t0), then half of them restored (t2). Accuracy.")
    heads = ("recipe", *(f"{what}: {metric}" for what, metric in _WORST), "restored, scene 1, t2: distance")
    yield Table(heads, tuple(worst), "The worst step of all four scenes.")


def _shown(value: float | None, metric: str) -> str:
    if value is None:
        return "—"
    return plain(value) if metric in (WRONG, CHANGE) else percent(value)


_WORST = (("erased", ACCURACY), ("restored", SHARE), ("restored", CHANGE), ("regular", SHARE), ("weights", WRONG))


def _scale(found: NAMED) -> Iterable[Table]:
    for numbers in found.values():
        ways = list(dict.fromkeys(s.rpartition(", N=")[0] for s in numbers.subjects() if ", N=" in s))
        counts = sorted({int(s.rpartition("=")[2]) for s in numbers.subjects() if ", N=" in s})
        rows = [(way, *(as_text(numbers.get(f"{way}, N={n}", "H_c")) for n in counts)) for way in ways]
        spread = max(numbers.value(s, "order spread") or 0.0 for s in numbers.subjects() if ", N=" in s)
        kept = as_text(numbers.get("base: kept", ACCURACY))
        output = (
            f"H_c over N. The judge on the base: {kept}. Tensors that depend on the order of patches: {plain(spread)}."
        )
        yield Table(("way to compose", *(f"N={n}" for n in counts)), tuple(rows), output)


def _crosstalk(found: NAMED) -> Iterable[Table]:
    correlations = list(dict.fromkeys(r.metric for n in found.values() for r in n.measurements if "rank" in r.metric))
    metrics = ("pairs that lost accuracy", *correlations)
    rows = [
        (name, *("—" if (value := n.value("all pairs", metric)) is None else plain(value) for metric in metrics))
        for name, n in found.items()
    ]
    pairs = next(iter(found.values())).get("all pairs", metrics[0])
    output = (
        f"Of {pairs.n if pairs else 0} pairs of a recipe; a dash where nothing was lost. Where no patch moves another "
        "concept, as with `separable`, there is nothing to rank but noise: the last row ranks all recipes' pairs together."
    )
    yield Table(("recipe", *metrics), (*rows, _all_pairs(found, metrics)), output)


def _all_pairs(found: NAMED, metrics: Sequence[str]) -> tuple[str, ...]:
    """The same over every recipe's pairs: does the prediction tell where there is cross-talk from where there is none?"""
    cells = []
    for metric in metrics:
        measured = next((m for m in (MOVED, LOST) if metric.endswith(f" {m}")), None)
        if measured is None:
            cells.append(plain(sum(n.value("all pairs", metric) or 0.0 for n in found.values())))
            continue
        ranked = [
            (numbers.value(subject, PREDICTED) or 0.0, numbers.value(subject, measured) or 0.0)
            for numbers in found.values()
            for subject in numbers.subjects()
            if " -> " in subject
        ]
        correlation = rank_correlation(*map(list, zip(*ranked, strict=True)))
        cells.append("—" if correlation is None else f"{plain(correlation)} (n={len(ranked)})")
    return ("all of them", *cells)


def _probes(found: NAMED) -> Iterable[Table]:
    average = "average of the concepts"
    attacks = list(dict.fromkeys(r.metric for n in found.values() for r in n.measurements if r.subject == average))
    rows = [(name, *(as_text(n.get(average, attack)) for attack in attacks)) for name, n in found.items()]
    text = (
        "Accuracy on erased objects after each attack, averaged over them, with the recipe's six patches in place. Where a "
        "sum of patches leaves little of everything else, too "
        "([many concepts at once](solvers.md#many-concepts-at-once)), little comes back for that reason."
    )
    yield Table(("recipe", *attacks), tuple(rows), text)


def _cost(found: NAMED) -> Iterable[Table]:
    rows = []
    for name, n in found.items():
        patches = [s for s in n.subjects() if "(" in s]
        each = [sum(n.value(s, m) or 0.0 for s in patches) / len(patches) for m in _EACH]
        peak = next((as_text(n.get(s, _PEAK)) for s in n.subjects() if n.get(s, _PEAK)), "—")
        rows.append((name, *map(plain, each), peak))
    yield Table(("recipe", *map(plain_words, _EACH), _PEAK), tuple(rows), "Means over six patches.")


_EACH = ("seconds to solve", "bytes", "seconds to lay on", "seconds to take off")
_PEAK = "peak memory of solving, MB"


def markdown(table: Table) -> str:
    """A table with its caption above it."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{table.caption}\n\n{body}"


def _provenance(records: Sequence[EvaluationRecord]) -> str:
    judges = sorted({record.judge for record in records})
    samplers = sorted(
        {", ".join(f"{k} {v}" for k, v in sorted(record.settings["sampler"].items())) for record in records}
    )
    software = sorted({", ".join(f"{k} {v}" for k, v in record.versions.items()) for record in records})
    base = f"judge: {'; '.join(judges)}\n- sampler: {'; '.join(samplers)}\n- software: {'; '.join(software)}"
    return f"## Provenance\n\n- {base}\n- every number, with seeds and settings: `benchmarks/results/`"
