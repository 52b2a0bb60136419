"""`docs/solvers.md` from measured cells and curves: a table for each question, every number with its interval and n."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from types import MappingProxyType
from typing import Any

from benchmarks.cells import BASE
from benchmarks.protocol import ASKED_BASE, ERASED, KEPT, NEAR, NEVER, OBJECTS, OTHERS, PAIRS, RESTORED, STYLES
from benchmarks.rates import Base, Cells, by_solver, doubted, ends, gap, pooled, rate, share, unmeasured
from benchmarks.results_page import markdown
from overpaint.core.errors import OverpaintError
from overpaint.evaluation.context import ACCURACY, SHARE
from overpaint.evaluation.metrics import Measurement
from overpaint.evaluation.report_page import Table, percent, plain

TITLES = {
    "emoji": ("Solvers, measured", "the embedded base", ""),
    "emoji-dit": (
        "Solvers on a diffusion transformer, measured",
        "the embedded transformer (`emoji-dit`, Stable Diffusion 3's architecture)",
        "OVERPAINT_BENCHMARK_BASE=emoji-dit ",
    ),
}
"""By base: title, what it is called, and what stands before the commands."""

INTRO = """# {title}

Written by `{v}python -m benchmarks.solvers --page`; do not edit. `{v}python -m benchmarks.solvers` and `{v}python -m
benchmarks.composition` measure what it shows. Each goes on where it was, and `--shard 0/2` and `--shard 1/2` share the work
between two processes.

On {base} every concept is erased alone by every solver, with the solver's preset `emoji` where it has one, and
the same sentences and seeds are drawn and judged for all. Percentages are what the judge finds right, then the 95% interval
(bootstrapped over sentences) and the number of pictures; *of the base* is the accuracy over that of the base on the same
pictures. An erased concept should be at 0, everything else at 100% of the base. Solvers that use a
universe get the listed objects and styles, and the synonyms of what they erase; the objects that are never listed are in none."""
KINDS = {"object": "Objects", "style": "Styles", "pair": "Objects in one style alone"}
PAIR = """A pair is erased when the judge no longer finds both its object and its style in the picture."""
DASH = "—"


def solvers_page(
    cells: Cells,
    curves: Mapping[str, Sequence[Measurement]],
    claims: Mapping[str, Sequence[Measurement]] = MappingProxyType({}),
) -> str:
    """The page, Markdown. Raises OverpaintError when nothing was measured, or the base not on the same pictures."""
    seen = [cell for cell in cells if cell.verdicts]
    if not seen:
        raise OverpaintError("no solver was measured yet; run python -m benchmarks.solvers first")
    base = Base.of(seen)
    title, called, variable = TITLES[ASKED_BASE]
    blocks = [INTRO.format(title=title, base=called, v=variable)]
    for kind, heading in KINDS.items():
        some = [cell for cell in seen if cell.kind == kind]
        if some:
            names = ", ".join(sorted({cell.concept for cell in some}, key=_place))
            blocks += [f"## {heading}", f"Erased one at a time, and averaged: {names}."]
            blocks += [PAIR] if kind == "pair" else []
            blocks += [markdown(table) for table in (_erased(some), _kept(some, base, kind))]
    alone = [cell for cell in seen if cell.kind != "pair"]
    blocks += ["## Does it matter whether somebody listed a concept?", markdown(_listing(alone, base))]
    blocks += ["## What a patch costs", markdown(_costs(alone))]
    blocks += list(_composed(curves))
    blocks += list(_claims(claims))
    refused = [f"- {cell.solver}, {cell.concept}: {cell.refused}" for cell in cells if cell.refused]
    blocks += ["## Refused", "\n".join(refused)] if refused else []
    blocks += _missing(seen, claims)
    return "\n\n".join([*blocks, _provenance(seen)]) + "\n"


def _missing(seen: Cells, claims: Mapping[str, Sequence[Measurement]]) -> list[str]:
    """What no figure stands for yet."""
    absent = [f"`{name}`" for name in unmeasured(seen)]
    absent += [] if claims else ["the claims of the abstracts"]
    if not absent:
        return []
    command = f"{TITLES[ASKED_BASE][2]}python -m benchmarks.all"
    return ["## Not measured on this base yet", f"{', '.join(absent)}; `{command}` measures what is missing."]


def _claims(claims: Mapping[str, Sequence[Measurement]]) -> Iterable[str]:
    """What the abstracts of All but One and SepME promise; a row for each solver, and for each step."""
    for prefix, heading, caption in CLAIMS:
        every = [row for name, some in claims.items() if name.startswith(prefix) for row in some]
        if not every:
            continue
        metrics = list(dict.fromkeys(row.metric for row in every))
        by_subject: dict[str, dict[str, Measurement]] = {}
        for row in every:
            by_subject.setdefault(row.subject, {})[row.metric] = row
        body = [
            (subject, *(_levels(found.get(m)) if m.startswith("change") else _spelled(found.get(m)) for m in metrics))
            for subject, found in by_subject.items()
        ]
        yield heading
        yield markdown(Table(("", *metrics), tuple(body), caption))


CLAIMS = (
    (
        "alternative",
        "## Only the concept changes, and into what was chosen",
        "Each concept is erased with an anchor (cat, dog; car, bicycle; pistol, banana; rose, sunflower). Changes are root mean "
        "square differences of the same seeds, in grey levels; outside is what the base draws in its background's colour.",
    ),
    (
        "increments",
        "## Increments beside each other (SepME)",
        "Objects are erased one after the other, each by an increment that is told of those before it, or of all from the start. "
        "The null space promises that a later increment leaves an earlier name alone; what earlier ones do to a later name is in "
        "the first column.",
    ),
)


def _levels(row: Measurement | None) -> str:
    """Grey levels with their interval and n."""
    if row is None:
        return DASH
    low, high = ends(row)
    return f"{row.value:.1f} ({low:.1f} to {high:.1f}, n={row.n})"


def _place(concept: str) -> tuple[int, str]:
    """Concepts in the order of the protocol."""
    order = (*OBJECTS, *STYLES, *PAIRS)
    return (order.index(concept) if concept in order else len(order), concept)


def _judged(cells: Cells, group: str) -> str:
    here = rate(pooled(cells, group))
    return _spelled(here.measurement(group, ACCURACY) if here is not None else None)


def _erased(cells: Cells) -> Table:
    groups = [group for group in ERASED if any(group in cell.verdicts for cell in cells)]
    rows = [(name, *(_judged(some, group) for group in groups)) for name, some in by_solver(cells).items()]
    return Table(("solver", *groups), tuple(rows), "The erased concept: accuracy, low is good.")


def _kept(cells: Cells, base: Base, kind: str) -> Table:
    groups = (*KEPT, *NEAR) if kind == "pair" else KEPT
    rows = []
    for name, some in by_solver(cells).items():
        shown = [_judged(some, group) if name == BASE else _spelled(share(some, group, base)) for group in groups]
        rows.append((name, *shown))
    return Table(
        ("solver", *groups), tuple(rows), "All others: per cent of the base's accuracy, which is the first row."
    )


def _listing(cells: Cells, base: Base) -> Table:
    """Over objects and styles together."""
    solvers = {name: some for name, some in by_solver(cells).items() if name != BASE}
    rows = [
        (name, *(_spelled(share(some, group, base)) for group in (OTHERS, NEVER)), _points(gap(some, base)))
        for name, some in solvers.items()
    ]
    columns = ("solver", f"{OTHERS}, of the base", f"{NEVER}, of the base", "difference")
    return Table(
        columns, tuple(rows), "The difference is in points of per cent; above 0, listed objects are kept better."
    )


def _costs(cells: Cells) -> Table:
    rows = []
    for name, some in by_solver(cells).items():
        costs = [cell.costs for cell in some if cell.costs is not None]
        if costs:
            kinds = ([c.seconds for c in costs], [c.megabytes for c in costs], [float(c.nbytes) for c in costs])
            each = (f(values) for values, which in zip(kinds, _SHOWN, strict=True) for f in which)
            rows.append((name, str(len(costs)), *map(plain, each)))
    output = (
        "Solving one concept, after the vocabulary was encoded once. Seconds are the clock's, in one of several processes with a "
        "thread each: for comparing solvers with each other. MB is the most memory in use beyond what was in use before; bytes "
        "are those of the patch's file."
    )
    heads = ("seconds, median", "MB, median", "MB, most", "bytes, median", "bytes, most")
    return Table(("solver", "concepts", *heads), tuple(rows), output)


_SHOWN: tuple[tuple[Callable[[list[float]], float], ...], ...] = ((median,), (median, max), (median, max))
"""Of seconds, memory and bytes. The longest solve says more about what else ran then."""


def _composed(curves: Mapping[str, Sequence[Measurement]]) -> Iterable[str]:
    """H_c over N, and the two accuracies that it is made of."""
    every = [row for some in curves.values() for row in some if ", N=" in row.subject]
    restored = [row for row in every if f", {RESTORED}, N=" in row.subject]
    rows = [row for row in every if row not in restored]
    if not rows:
        return
    yield "## Many concepts at once"
    counts = sorted({int(row.subject.rpartition("=")[2]) for row in rows})
    ways = list(dict.fromkeys(row.subject.rpartition(", N=")[0] for row in rows))
    numbers = {(row.subject, row.metric): row for row in rows}
    numbers |= {key: doubted(row, numbers) for key, row in numbers.items() if row.metric == "H_c"}
    kept = next(row for some in curves.values() for row in some if row.subject == "base: kept")
    yield (
        "The first N listed objects are erased at once; kept are objects that are in no universe. `separable`, "
        "`separable_mlp` and `nullspace` know all that is listed, `sepme` as many as its sums go to, the others work alone. "
        "A plain sum adds patches as they are; "
        "`separable:share=0` lets no concept's own keys weigh more than the others', as suits concepts that are "
        "never erased alone; `+decoupled` patches were decoupled from all that is listed first; task arithmetic and TIES "
        f"merge patches, and `joint` is one solve for all N. The base's own accuracy on what is kept: {_spelled(kept)}."
    )
    for metric, output in (
        ("H_c", "H_c, the harmonic mean of what is erased and what is kept."),
        ("accuracy on erased", "Accuracy on the N erased objects."),
        ("accuracy on kept", "Accuracy on the objects that are kept."),
    ):
        body = [(way, *(_spelled(numbers.get((f"{way}, N={n}", metric))) for n in counts)) for way in ways]
        yield markdown(Table(("way to compose", *(f"N={n}" for n in counts)), tuple(body), output))
    for row in restored:
        if row.metric == SHARE:
            yield (
                f"`{row.subject.partition(', ')[0]}`, with {int(row.subject.rpartition('=')[2]) - 1} of "
                f"{row.subject.rpartition('=')[2]} left in place and each of them restored in turn: {_spelled(row)} of the "
                "base's accuracy on it."
            )
    spread = max(row.value for row in rows if row.metric == "order spread")
    yield f"Tensors that depend on the order in which patches are added: {plain(spread)}."


def _spelled(row: Measurement | None) -> str:
    """A share with its interval and n."""
    if row is None:
        return DASH
    low, high = ends(row)
    return f"{percent(row.value)} ({percent(low)} to {percent(high)}, n={row.n})"


def _points(row: Measurement | None) -> str:
    """A difference of shares."""
    if row is None:
        return DASH
    low, high = ends(row)
    return f"{100 * row.value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}, n={row.n})"


def _provenance(cells: Cells) -> str:
    names = ("judge", "drawn", "fingerprint", "threads", "processor", "overpaint", "torch", "diffusers", "transformers")
    known = {name: sorted({str(cell.made[name]) for cell in cells if name in cell.made}) for name in names}
    lines = [f"- {name}: {', '.join(values)}" for name, values in known.items() if values]
    return "## Provenance\n\n" + "\n".join(lines)


def short_rows(cells: Cells) -> tuple[tuple[str, ...], list[list[Any]]]:
    """A row for each solver with per cent and n, over all concepts: for the terminal and `--json`."""
    groups = dict(zip((*ERASED, *KEPT), ("seen", "synonyms", "held out", "listed", "never", "styles"), strict=True))
    rows: list[list[Any]] = []
    for name, some in by_solver([cell for cell in cells if cell.verdicts and cell.kind != "pair"]).items():
        means = [rate(pooled(some, group)) for group in groups]
        costs = [cell.costs for cell in some if cell.costs is not None]
        cost = [median(c.seconds for c in costs), max(c.megabytes for c in costs)] if costs else [None, None]
        rates = [None if m is None else f"{100 * m.value:.1f} of {m.n}" for m in means]
        rows.append([name, len(some), *rates, *cost])
    return ("solver", "concepts", *groups.values(), "s", "MB"), rows
