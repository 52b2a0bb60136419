"""Every solver on the embedded base: what is erased, what is kept, what it costs; the same prompts and seeds for all.

A solver is named with its settings: `--solver uce --solver esd:preset=emoji,iterations=50`. Each concept is erased alone; a
row is the average over concepts. Besides the concepts of the run, a solver is told of the first `--known` other objects;
the others that are judged are among all objects and styles of the base, most of them never mentioned to the solver.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import arguments, save, show
from overpaint.bases.base import Base
from overpaint.bases.device import resolve_device
from overpaint.bases.emoji.catalogue import Scene, captions, catalogue
from overpaint.concepts import Concept
from overpaint.evaluation.images import Sampler, generate
from overpaint.evaluation.judging import Score, accuracy, load_judge
from overpaint.evaluation.prompts import Trial, object_prompts, style_prompts
from overpaint.patches.compose import Term
from overpaint.patches.live import Overlay
from overpaint.patches.patch import make_patch
from overpaint.solvers import solver_class
from overpaint.solvers.problem import EditProblem, Solver, configure, settings_of
from overpaint.solvers.universe import prepare

ASKED = ("seen", "synonyms", "held-out")
SYNONYM_SEEDS = 5_000


@dataclass(frozen=True)
class Asked:
    """A named solver with its settings, as it was asked for."""

    text: str
    name: str
    solver: Solver

    @classmethod
    def parse(cls, text: str) -> Asked:
        """`NAME` or `NAME:K=V,K=V`."""
        name, _, rest = text.partition(":")
        pairs = (pair.partition("=") for pair in rest.split(",") if pair)
        return cls(text, name, configure(solver_class(name), {k.strip(): v for k, _, v in pairs}))


@dataclass
class Row:
    """What one solver reached, summed over concepts."""

    correct: dict[str, int] = field(default_factory=dict)
    n: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)

    def add(self, what: str, score: Score) -> None:
        self.correct[what] = self.correct.get(what, 0) + score.correct
        self.n[what] = self.n.get(what, 0) + score.n

    def cells(self, name: str, concept: str) -> list[Any]:
        """The row of the table: rates with their 95% intervals, then the dearest concept's costs."""
        rates = [_percent(Score(self.correct[w], self.n[w])) if w in self.n else None for w in (*ASKED, "others")]
        costs = [max(kind, default=None) for kind in (self.seconds, self.megabytes, self.nbytes)]
        return [name, concept, *rates, *costs]


class Bench:
    """The base, its judge and the prompts; draws with whatever patch is laid on."""

    def __init__(self, concepts: Sequence[str], prompts: int, others: int, known: int, device: str, steps: int) -> None:
        self.base, self.device = Base.open("emoji"), resolve_device(device)
        self.judge = load_judge(self.base.path).to(self.device)
        self.pipe = self.base.pipeline(device=str(self.device))
        self.overlay = Overlay(self.pipe, self.base)
        self.sampler = Sampler(steps=steps, guidance=float(self.base.extras.get("guidance", 4.0)))
        self.concepts = [_concept(name) for name in concepts]
        rest = [name for name in catalogue().objects if name not in concepts]
        self.universe = (*self.concepts, *(_concept(name) for name in rest[:known]))
        self.trials = {c.name: _trials(c, prompts) for c in self.concepts}
        self.others = _others(concepts, others)

    def score(self, trials: Sequence[Trial], head: str) -> Score:
        pictures = generate(self.pipe, [t.prompt for t in trials], [t.seed for t in trials], self.sampler)
        return accuracy(self.judge, pictures, [t.truth for t in trials], head)

    def judged(self, concept: Concept, row: Row, sums: Row) -> None:
        """Draw and judge everything that is asked about one concept."""
        head = "style" if concept.kind == "style" else "object"
        for what, trials in self.trials[concept.name].items():
            if trials:
                score = self.score(trials, head)
                row.add(what, score)
                sums.add(what, score)
        for head, trials in self.others.items():
            score = self.score(trials, head)
            row.add("others", score)
            sums.add("others", score)

    def rows(self, asked: Asked) -> Iterator[list[Any]]:
        """A row for each concept, and the one for all of them."""
        sums = Row()
        for concept in self.concepts:
            row = Row()
            with peak_megabytes(self.device) as peak:
                started = time.perf_counter()
                problem = EditProblem(self.base, concept, self.universe, device=self.device)
                solution = asked.solver.solve(problem)
                seconds = time.perf_counter() - started
            origin = {"name": asked.name, "settings": settings_of(asked.solver), "seed": 0}
            patch = make_patch(self.base, concept, solution.delta, origin)
            for one in (row, sums):
                one.seconds.append(seconds)
                one.megabytes.append(peak[0])
                one.nbytes.append(len(patch.blob))
            with self.overlay.applied([Term(patch.id, solution.delta)]):
                self.judged(concept, row, sums)
            cells = row.cells(asked.text, concept.name)
            found = {name: value for name, value in solution.diagnostics.items() if name != "seconds"}
            print(*cells, found, sep=" | ", flush=True)
            yield cells
        yield sums.cells(asked.text, "all")

    def base_rows(self) -> Iterator[list[Any]]:
        """What the base alone draws."""
        sums = Row()
        for i, concept in enumerate(self.concepts):
            head = "style" if concept.kind == "style" else "object"
            for what, trials in self.trials[concept.name].items():
                if trials:
                    sums.add(what, self.score(trials, head))
            for head, trials in self.others.items() if i == 0 else ():
                sums.add("others", self.score(trials, head))
        yield sums.cells("(base)", "all")


def _percent(score: Score) -> str:
    """Per cent, the ends of the 95% interval, and of how many pictures."""
    low, high = score.interval
    return f"{100 * score.rate:.0f} ({100 * low:.0f}-{100 * high:.0f}) of {score.n}"


def _concept(name: str) -> Concept:
    words = catalogue()
    if name in words.styles:
        return Concept(name, "style", anchor=next(s for s in words.styles if s != name))
    return Concept(name, "object", words.names[name][1:] if name in words.names else ())


def _trials(concept: Concept, count: int) -> dict[str, list[Trial]]:
    """Prompts in the templates of training, with synonyms, and in held-out templates."""
    ask = style_prompts if concept.kind == "style" else object_prompts
    found = {held: ask([concept.name], count, held_out=held) for held in (False, True)}
    sentences = captions(Scene(concept.name)) if concept.kind != "style" else []
    meant = [s for s in sentences if any(s.endswith(f" {word}") for word in concept.synonyms)]
    spread = [meant[(7 * i) % len(meant)] for i in range(count)] if meant else []
    synonyms = [Trial(s, concept.name, SYNONYM_SEEDS + i) for i, s in enumerate(spread)]
    return {"seen": found[False], "synonyms": synonyms, "held-out": found[True]}


def _others(concepts: Sequence[str], count: int) -> dict[str, list[Trial]]:
    """By the judge's head: `count` prompts over all other objects and a quarter as many over all other styles."""
    words = catalogue()

    def spread(trials: Sequence[Trial], wanted: int) -> list[Trial]:
        clear = [t for t in trials if not any(f" {name} " in f" {t.prompt} " for name in concepts)]
        return [clear[i * len(clear) // wanted] for i in range(min(wanted, len(clear)))]

    objects = object_prompts([o for o in words.objects if o not in concepts], 3, held_out=True)
    styles = style_prompts([s for s in words.styles if s not in concepts], 12, held_out=True)
    return {"object": spread(objects, count), "style": spread(styles, max(1, count // 4))}


@contextmanager
def peak_megabytes(device: torch.device) -> Iterator[list[float]]:
    """Put into the list how many megabytes (10^6) more than before were in use at most within the block.

    On a GPU, what PyTorch allocated there; otherwise the process's resident memory, looked at every few milliseconds.
    """
    found = [0.0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found[0] = (torch.cuda.max_memory_allocated(device) - before) / 1e6
        return
    before, done = _resident(), threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            found[0] = max(found[0], (_resident() - before) / 1e6)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def _resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--solver", action="append", metavar="NAME[:K=V,...]", help="may be repeated")
    parser.add_argument("--concepts", nargs="+", default=["cat", "car", "pistol", "ink"], help="objects and styles")
    parser.add_argument("--prompts", type=int, default=10, help="prompts of each of the three sets for each concept")
    parser.add_argument("--others", type=int, default=40, help="prompts about other objects")
    parser.add_argument("--known", type=int, default=0, help="how many other objects the solvers are told of")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-base", action="store_true", help="do not draw the base's own row")
    chosen = parser.parse_args()
    asked = [Asked.parse(text) for text in chosen.solver or ["separable"]]
    bench = Bench(chosen.concepts, chosen.prompts, chosen.others, chosen.known, chosen.device, chosen.steps)
    started = time.perf_counter()
    prepare(bench.base, bench.universe, bench.device)
    print(f"{time.perf_counter() - started:.1f} s once to encode the vocabulary and the concepts", flush=True)
    rows = [] if chosen.no_base else list(bench.base_rows())
    for one in asked:
        rows += bench.rows(one)
    columns = ("solver", "concept", *ASKED, "others", "seconds", "MB", "bytes")
    title = f"Judged right, per cent: erased concepts (low is good), others (high is good); {bench.device}"
    save(chosen.json, show(title, columns, rows))


if __name__ == "__main__":
    main()
