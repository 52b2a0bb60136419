"""What the papers' abstracts claim, measured on the embedded base: All but One, and SepME's increments beside each other.

*All but One* (Hong et al., arXiv 2312.12807) promises a picture whose structure stays, an alternative that the user chooses, and
an unconditional score that does not drift. Each concept is erased with an anchor (a pistol becomes a banana) by `surgical` and
by others beside it: how often the judge still sees the concept, and how often the anchor; by how many grey levels the picture of
the same seed changes outside of the object and inside of it; and by how many the pictures of the empty prompt change. Outside is
what the base draws in the colour of the picture's border, two pixels from anything else.

*SepME* (Zhao et al., arXiv 2402.05947) promises increments "with knowledge of only previously forgotten concepts". Concepts are
erased one after the other, each by an increment that is told of those before it: the null space promises that it leaves their
names alone, and nothing of what earlier increments do to a name that comes later. So before its own increment each concept is
judged under all earlier ones, and after it all of them are judged again.

Each job is kept in the work folder of `python -m benchmarks.solvers` when it is done, which also writes the page. `--on ray` and
`--on ray://HOST:PORT` do the jobs on a Ray cluster.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from benchmarks.cells import NO_END, WHOLE, Budget, Job, KeptRows, Shard, add_on_option, carried_out, working_on
from benchmarks.protocol import OBJECTS, WORDS, concept_of, never_listed, universe
from benchmarks.solvers import WORK, Asked, Bench, BenchReference
from benchmarks.tables import arguments, save, show
from overpaint.core.concepts import Concept
from overpaint.core.executors import Executor
from overpaint.evaluation.metrics import Measurement, mean
from overpaint.evaluation.prompts import OBJECT, EvalPrompt
from overpaint.patches.compose import Term

ANCHORED = {"cat": "dog", "car": "bicycle", "pistol": "banana", "rose": "sunflower"}
"""What becomes what, where the catalogue has both."""
ALTERNATIVES = ("surgical", "esd", "ablation", "separable")
SEQUENCED, INCREMENTS = "sepme", 6
SEEN, BECAME, OUTSIDE, INSIDE, EMPTY = (
    "concept still seen",
    "anchor seen",
    "change outside of the object",
    "change inside of the object",
    "change under the empty prompt",
)
BORDER, APART, MARGIN = 2, 40, 2
"""Pixels of the border, grey levels that make another colour, and pixels around the object that belong to it."""

Pictures = NDArray[np.uint8]


def object_region(pictures: Pictures) -> NDArray[np.bool_]:
    """Where each picture, uint8 [n, h, w, 3], is not of its border's colour, and what is next to that: [n, h, w]."""
    edge = np.ones(pictures.shape[1:3], bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    border = np.median(pictures[:, edge], axis=1)
    other = (np.abs(pictures.astype(np.int16) - border[:, None, None]) > APART).any(-1)
    grown = F.max_pool2d(torch.from_numpy(other[:, None]).float(), 2 * MARGIN + 1, 1, MARGIN)[:, 0]
    return np.asarray(grown.numpy() > 0)


def change_in(before: Pictures, after: Pictures, region: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The root mean square difference of each pair of pictures within a region [n, h, w], in grey levels; 0 in an empty one."""
    gap = np.square(before.astype(np.float64) - after).mean(-1)
    return np.asarray(np.sqrt((gap * region).sum((1, 2)) / np.maximum(region.sum((1, 2)), 1)))


def anchored(name: str) -> Concept:
    """The concept of an object with its synonyms, and the anchor that it should become."""
    plain = concept_of(name)
    return Concept(name, "object", plain.synonyms, anchor=ANCHORED[name])


def pairs() -> list[str]:
    """The objects of which the catalogue has the anchor too."""
    known = WORDS.objects
    return [name for name, anchor in ANCHORED.items() if name in known and anchor in known]


def alternative(bench: Bench, solver: str, n: int) -> list[Measurement]:
    """All but One's claims for one solver, over `n` pictures of its concepts together, and as many of the empty prompt."""
    asked, each = Asked.parse(solver), -(-n // len(pairs()))
    parts: dict[str, list[float]] = {metric: [] for metric in (SEEN, BECAME, OUTSIDE, INSIDE, EMPTY)}
    prompts: list[str] = []
    for name in pairs():
        patch, _ = bench.solved(asked, anchored(name), universe(asked.name), universe("separable"))
        terms, questions = [Term(patch.id, patch.delta)], bench.prompt_set.prompts(OBJECT, name, each)
        before, after = bench.image_generator.draw((), questions), bench.image_generator.draw(terms, questions)
        region = object_region(before)
        for metric, shown in ((SEEN, name), (BECAME, ANCHORED[name])):
            parts[metric] += _shown(bench, after, shown).tolist()
        parts[OUTSIDE] += change_in(before, after, ~region).tolist()
        parts[INSIDE] += change_in(before, after, region).tolist()
        nothing = [EvalPrompt("", question.seed, {}) for question in questions]
        still, drifted = bench.image_generator.draw((), nothing), bench.image_generator.draw(terms, nothing)
        parts[EMPTY] += change_in(still, drifted, np.ones(still.shape[:3], bool)).tolist()
        prompts += [question.prompt for question in questions]
    return [mean(values, prompts).measurement(solver, metric) for metric, values in parts.items()]


def increments(bench: Bench, n: int, knows_all: bool) -> list[Measurement]:
    """SepME's increments one after the other, each told of the earlier concepts (or, `knows_all`, of all from the start)."""
    names, asked = OBJECTS[:INCREMENTS], Asked.parse(SEQUENCED)
    label = "sepme, told of all" if knows_all else "sepme, told of those before"
    questions = {name: bench.prompt_set.prompts(OBJECT, name, -(-n // 2)) for name in names}
    others = [q for name in never_listed()[:n] for q in bench.prompt_set.prompts(OBJECT, name, 3)][:n]
    terms: list[Term] = []
    rows = []
    for step, name in enumerate(names):
        rows.append(
            _rate(bench, terms, questions[name], f"{label}, step {step + 1}", "the next one, before its increment")
        )
        known = names if knows_all else names[:step]
        patch, _ = bench.solved(asked, concept_of(name), tuple(map(concept_of, known)))
        terms.append(Term(patch.id, patch.delta))
        erased = [question for each in names[: step + 1] for question in questions[each]]
        rows.append(_rate(bench, terms, erased, f"{label}, step {step + 1}", "all erased so far"))
        rows.append(_rate(bench, terms, others, f"{label}, step {step + 1}", "others"))
    return rows


def _rate(
    bench: Bench, terms: Sequence[Term], questions: Sequence[EvalPrompt], subject: str, metric: str
) -> Measurement:
    pictures = bench.image_generator.draw(terms, questions)
    names = bench.judge.heads[OBJECT]
    right = bench.judge.probabilities(pictures, OBJECT).argmax(1) == [names.index(q.shows[OBJECT]) for q in questions]
    return mean(right.astype(np.float64), [q.prompt for q in questions]).measurement(subject, metric)


def _shown(bench: Bench, pictures: Pictures, name: str) -> NDArray[np.float64]:
    likely = bench.judge.probabilities(pictures, OBJECT).argmax(1)
    return np.asarray(likely == bench.judge.heads[OBJECT].index(name), np.float64)


def jobs(n: int) -> list[Job]:
    """Everything there is to measure; each gives measurements."""
    return [
        *(Job(f"alternative-{solver}", alternative, (solver, n)) for solver in ALTERNATIVES),
        Job("increments-before", increments, (n, False)),
        Job("increments-all", increments, (n, True)),
    ]


def run(
    bench: Bench,
    work: Path,
    every: Sequence[Job],
    n: int,
    shard: Shard = WHOLE,
    budget: Budget = NO_END,
    executor: Executor | None = None,
) -> dict[str, str]:
    """Do this shard's jobs that are not kept with so many pictures; what was refused, and why. Raises BudgetSpent.

    `executor` says where they are done, this process by default.
    """
    files = {
        job.name: KeptRows(
            work / "claims" / f"{job.name}.json", {"n": n, "drawn": bench.drawn, "settings": _settings(job)}
        )
        for job in every
    }
    missing = [job for job in shard.part(every) if not files[job.name].is_kept]
    refused = {}
    for index, rows, error in carried_out(BenchReference(bench), missing, executor, budget):
        if error:
            refused[missing[index].name] = error
        else:
            files[missing[index].name].keep(rows)
    return refused


def _settings(job: Job) -> dict[str, Any]:
    """Those of the solver that a job is about: what was found with others is measured again."""
    return Asked.parse(job.arguments[0] if job.call is alternative else SEQUENCED).settings


def measured_claims(work: Path) -> dict[str, list[Measurement]]:
    """What is kept, by the name of its job."""
    return {place.stem: KeptRows.read(place) for place in sorted((work / "claims").glob("*.json"))}


def rows(found: Iterable[Sequence[Measurement]]) -> list[list[object]]:
    """A row for each number: whose, what, how much, over how many."""
    return [[row.subject, row.metric, row.value, row.low, row.high, row.n] for some in found for row in some]


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--n", type=int, default=100, help="pictures for each number")
    parser.add_argument("--shard", default="0/1", help="which part of the work is done here, such as 0/2")
    parser.add_argument("--budget", type=float, default=0.0, help="seconds after which nothing is begun; 0: no end")
    add_on_option(parser)
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=WORK, help="patches, pictures and what is found")
    asked = parser.parse_args(argv)
    bench = Bench(asked.work, asked.device, asked.steps)
    budget = Budget(asked.budget)
    with working_on(asked.on) as executor:
        refused = run(bench, asked.work, jobs(asked.n), asked.n, Shard.parse(asked.shard), budget, executor)
        for name, why in refused.items():
            print(f"{name}: {why}", file=sys.stderr)
    columns = ["whose", "what", "value", "low", "high", "n"]
    save(asked.json, show("What the abstracts claim", columns, rows(measured_claims(asked.work).values())))


if __name__ == "__main__":
    # Workers import this module; what is defined in `__main__` they could not find.
    from benchmarks.claims import main as importable_main

    importable_main()
