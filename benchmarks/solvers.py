"""Every solver on the embedded base: what is erased, what is kept, what it costs; the same prompts and seeds for all.

Each concept is erased alone, by every solver in turn: `--solver uce --solver esd:steps=50`. A solver stands for itself
with its preset `emoji`, where it has one; `NAME:preset=` takes the paper's values, and `NAME+decoupled` takes out of the patch
what it does to the listed concepts. `--n 100` asks for as many pictures as make 100 in every cell of the page. What every
(solver, concept) showed is kept in a file of the work folder at once, beside the patch and the pictures: a run that is killed,
or asked for more pictures, goes on where it was, `--shard 0/2` and `--shard 1/2` share the work between two processes, and with
`--budget` nothing is begun after so many seconds. `--on ray` and `--on ray://HOST:PORT` measure the cells on a Ray cluster.
`--page` runs nothing and writes `docs/solvers.md` from what is there, with the curve of `python -m benchmarks.composition` and
the claims of `python -m benchmarks.claims`, and the table in `docs/choosing-a-solver.md`.
"""

from __future__ import annotations

import platform
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.cells import (
    BASE,
    NO_END,
    Budget,
    Cell,
    Cells,
    Costs,
    Job,
    Origin,
    Patches,
    Shard,
    Verdict,
    add_on_option,
    carried_out,
    working_on,
    write,
)
from benchmarks.memory import peak_megabytes
from benchmarks.protocol import ASKED_BASE, OBJECTS, PAIRS, STYLES, Counts, concept_of, questions, tuned, universe
from benchmarks.tables import arguments, save, show
from overpaint.bases.base import Base, BaseReference
from overpaint.bases.loading import resolve_device
from overpaint.core.concepts import Concept
from overpaint.core.errors import OverpaintError
from overpaint.core.executors import Executor, machine_name
from overpaint.evaluation.images import ImageCache, ImageGenerator, Sampler
from overpaint.evaluation.judges import Judge, open_judge
from overpaint.evaluation.prompts import EmojiPrompts, EvalPrompt, catalogue
from overpaint.patches.compose import Term
from overpaint.patches.patch import Patch
from overpaint.solvers import SOLVERS, solver_class
from overpaint.solvers.closed_form.decoupling import decouple
from overpaint.solvers.problem import EditProblem, Solution, Solver, configure, settings_of
from overpaint.solvers.universe import prepare
from overpaint.workspace.evaluating import versions

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / ("solvers" if ASKED_BASE == "emoji" else f"solvers-{ASKED_BASE}")
PAGE = ROOT / "docs" / ("solvers.md" if ASKED_BASE == "emoji" else "solvers-on-a-transformer.md")
CHOOSING = ROOT / "docs" / "choosing-a-solver.md"
DECOUPLED = {"": "", "decoupled": "ridge", "exact": "exact"}
"""What may stand behind a solver's name, and the rule by which its patches are decoupled then."""
PAIRED = ("separable",)
"""Solvers that are also asked to erase an object in one style alone."""


@dataclass(frozen=True)
class Asked:
    """A named solver with its settings, as it was asked for."""

    text: str
    name: str
    solver: Solver
    decoupled: str = ""

    @classmethod
    def parse(cls, text: str) -> Asked:
        """`NAME` or `NAME:K=V,K=V`, on top of the preset `emoji` where there is one; and `+decoupled` or `+exact` behind it."""
        plain, _, after = text.partition("+")
        if after not in DECOUPLED:
            raise OverpaintError(f"behind a solver stands +decoupled, +exact or nothing; got {text!r}")
        name, _, rest = plain.partition(":")
        pairs = (pair.partition("=") for pair in rest.split(",") if pair)
        settings = tuned(name) | {key.strip(): value for key, _, value in pairs}
        return cls(text, name, configure(solver_class(name), settings), DECOUPLED[after])

    def origin(self, told: Sequence[Concept], seed: int = 0, *, apart: Sequence[Concept] = ()) -> dict[str, Any]:
        """What a patch of this solver follows from beside its base and its concept; with what it is decoupled from."""
        listed = [concept.as_json() for concept in told]
        found = {"name": self.name, "settings": self._decisive, "seed": seed, "universe": listed}
        if not self.decoupled:
            return found
        return {**found, "decoupled": {"rule": self.decoupled, "universe": [concept.as_json() for concept in apart]}}

    def origins(self, concept: Concept, told: Sequence[Concept], apart: Sequence[Concept]) -> tuple[Origin, ...]:
        """What this solver's patch of a concept follows from; after the patch that it is taken from where it is decoupled."""
        whole = replace(self, decoupled="")
        every = (whole, self) if self.decoupled else (self,)
        return tuple((concept, each.origin(told, apart=apart)) for each in every)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what a patch is: the solver's settings, its revision, how its patches are decoupled."""
        return self._decisive | ({"decoupled": self.decoupled} if self.decoupled else {})

    @property
    def _decisive(self) -> dict[str, Any]:
        """All that decides what the solver computes."""
        return settings_of(self.solver) | {"revision": self.solver.revision}


class Bench:
    """The base with its judge, an image generator with a cache, and the patches that were solved before."""

    def __init__(self, work: Path, device: str, steps: int, base: str | Base = ASKED_BASE) -> None:
        self.work, self.steps, self.device = work, steps, resolve_device(device)
        self.base = base if isinstance(base, Base) else Base.open(base)
        self.prompt_set = EmojiPrompts(catalogue(self.base.path))
        self.judge: Judge = open_judge("", self.base, self.prompt_set, self.device)
        sampler = Sampler.of(self.base, steps)
        self.image_generator = ImageGenerator(self.base, sampler, ImageCache(work / "pictures"), self.device)
        self.patches = Patches(work / "patches", self.base)
        self._ready = False

    def solved(
        self, asked: Asked, concept: Concept, told: Sequence[Concept], apart: Sequence[Concept] = ()
    ) -> tuple[Patch, Costs]:
        """The patch of a concept, kept or solved now; decoupled from `apart` where that was asked for."""
        if asked.decoupled:

            def separate() -> tuple[Solution, float, float]:
                whole, costs = self.solved(replace(asked, decoupled=""), concept, told)
                self._prepare()
                started = time.perf_counter()
                found = decouple(
                    EditProblem(self.base, concept, tuple(apart), device=self.device), whole.delta, asked.decoupled
                )
                return found, costs.seconds + time.perf_counter() - started, costs.megabytes

            return self.patches.solved(concept, asked.origin(told, apart=apart), separate)

        def solve() -> tuple[Solution, float, float]:
            self._prepare()
            problem = EditProblem(self.base, concept, tuple(told), device=self.device)
            with peak_megabytes(self.device) as peak:
                started = time.perf_counter()
                solution = asked.solver.solve(problem)
                seconds = time.perf_counter() - started
            return solution, seconds, peak[0]

        return self.patches.solved(concept, asked.origin(told), solve)

    def has(self, origin: Origin) -> bool:
        """Whether the patch that follows from this is kept."""
        return self.patches.has(*origin)

    def _prepare(self) -> None:
        """What is computed of the base once counts for no solver: the pipeline's imports, vocabulary and listed concepts."""
        if not self._ready:
            assert self.image_generator.overlay is not None
            prepare(self.base, universe("separable"), self.device)
            self._ready = True

    def verdicts(
        self, terms: Sequence[Term], asked: Mapping[str, Sequence[EvalPrompt]]
    ) -> dict[str, tuple[Verdict, ...]]:
        """By group, whether the pictures show what they should under some terms."""
        every = [question for some in asked.values() for question in some]
        right = iter(seen_right(self.judge, self.image_generator.draw(terms, every), every))
        return {group: tuple(Verdict(q.prompt, q.seed, next(right)) for q in some) for group, some in asked.items()}

    @property
    def drawn(self) -> str:
        """How pictures are drawn; cells of other ways do not compare."""
        return self.image_generator.how

    def made(self) -> dict[str, Any]:
        """What one must know to measure a cell again."""
        cores = {"threads": torch.get_num_threads(), "processor": platform.machine()}
        return (
            {"drawn": self.drawn, "judge": self.judge.name, "fingerprint": self.base.fingerprint} | cores | versions()
        )


class BenchReference:
    """A bench by how it was opened: what travels to another process, which opens it once and keeps it between jobs."""

    def __init__(self, bench: Bench) -> None:
        self._bench: Bench | None = bench
        self._how: tuple[Path, str, int, str, BaseReference] | None = None

    def __getstate__(self) -> dict[str, Any]:
        bench = self.open()
        how = (bench.work, bench.device.type, bench.steps, ASKED_BASE, BaseReference(bench.base))
        return {"_bench": None, "_how": how}

    def open(self) -> Bench:
        """The bench. Raises OverpaintError where this machine has not its base, or asks about another one's words."""
        if self._bench is None:
            assert self._how is not None
            work, device, steps, asked_base, base = self._how
            if asked_base != ASKED_BASE:
                raise OverpaintError(
                    f"the worker on {machine_name()} asks about the base {ASKED_BASE} and this program about {asked_base}; start "
                    f"its node with OVERPAINT_BENCHMARK_BASE={asked_base}"
                )
            self._bench = _bench_here(work, device, steps, base.open())
        return self._bench


@lru_cache(maxsize=1)
def _bench_here(work: Path, device: str, steps: int, base: Base) -> Bench:
    return Bench(work, device, steps, base)


def seen_right(judge: Judge, pictures: NDArray[np.uint8], asked: Sequence[EvalPrompt]) -> list[bool]:
    """Whether each picture (uint8 [n, h, w, 3]) shows, by every head that its question is about, what it should."""
    seen = {
        head: [judge.heads[head][i] for i in judge.probabilities(pictures, head).argmax(1)]
        for head in sorted({head for question in asked for head in question.shows})
    }
    return [all(seen[head][i] == name for head, name in question.shows.items()) for i, question in enumerate(asked)]


def measured(context: Bench, solver: str, name: str, asked: Mapping[str, Sequence[EvalPrompt]]) -> Cell:
    """A cell: the concept solved for, everything drawn and judged. What a solver refuses is a cell that says why."""
    concept = concept_of(name)
    if solver == BASE:
        return Cell(BASE, name, _kind(concept), {}, context.made(), context.verdicts((), asked))
    method = Asked.parse(solver)
    settings = method.settings
    try:
        patch, costs = context.solved(method, concept, universe(method.name), universe("separable"))
    except OverpaintError as error:
        return Cell(solver, name, _kind(concept), settings, context.made(), refused=str(error))
    verdicts = context.verdicts([Term(patch.id, patch.delta)], asked)
    return Cell(solver, name, _kind(concept), settings, context.made() | {"patch": patch.id}, verdicts, costs)


def _kind(concept: Concept) -> str:
    """What the page averages over together."""
    return "pair" if concept.name in PAIRS else concept.kind


def jobs(solvers: Sequence[str], concepts: Sequence[str], pairs: Sequence[str]) -> list[tuple[str, str]]:
    """Every (solver, concept) there is to measure, the base first; pairs only for solvers that are asked for them."""
    paired = [solver for solver in solvers if solver.partition(":")[0] in PAIRED]
    found = [(solver, name) for solver in (BASE, *solvers) for name in concepts]
    return found + [(solver, name) for solver in (BASE, *paired) for name in pairs if paired]


def run(
    context: Bench,
    cells: Cells,
    work: Sequence[tuple[str, str]],
    counts: Counts | int,
    budget: Budget = NO_END,
    executor: Executor | None = None,
) -> None:
    """Measure what is missing, each cell kept when it is done; so many pictures, or so many in every cell.

    `executor` says where, this process by default. Raises BudgetSpent when there is more to do than time.
    """
    missing: list[tuple[bool, Job]] = []
    for solver, name in work:
        asked = questions(name, Counts.at_least(counts, name) if isinstance(counts, int) else counts)
        method = None if solver == BASE else Asked.parse(solver)
        cell = cells.find(solver, name)
        if cell is not None and cell.answers(asked, method.settings if method else {}, context.drawn):
            continue
        told = (universe(method.name), universe("separable")) if method else None
        needs = method.origins(concept_of(name), *told) if method and told else ()
        job = Job(f"{solver}, {name}", measured, (solver, name, asked), needs)
        missing.append((bool(method and method.decoupled), job))
    for jobs in whole_first(missing):
        for _, found, _ in carried_out(BenchReference(context), jobs, executor, budget):
            if found is not None:
                cells.save(found)
                if found.refused:
                    print(f"{found.solver}, {found.concept}: {found.refused}", file=sys.stderr, flush=True)


def whole_first(jobs: Sequence[tuple[bool, Job]]) -> tuple[list[Job], list[Job]]:
    """Jobs, and those (marked True) that decouple a patch: they come after the others, or two workers might solve it."""
    plain, decoupled = ([job for is_decoupled, job in jobs if is_decoupled == wanted] for wanted in (False, True))
    return plain, decoupled


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--solver", action="append", metavar="NAME[:K=V,...]", help="may be repeated; all without it")
    parser.add_argument("--concepts", nargs="+", default=[*OBJECTS, *STYLES], help="objects and styles")
    parser.add_argument("--pairs", nargs="*", default=[*PAIRS], help="objects in a style, for some solvers")
    parser.add_argument("--own", type=int, default=Counts.own, help="pictures of each way to ask for a concept")
    parser.add_argument(
        "--others", type=int, default=Counts.others, help="pictures of listed objects, and as many of never listed ones"
    )
    parser.add_argument("--styles", type=int, default=Counts.styles, help="pictures of other styles")
    parser.add_argument(
        "--n", type=int, default=0, help="pictures in every cell of the page, instead of the three above"
    )
    parser.add_argument("--budget", type=float, default=0.0, help="seconds after which nothing is begun; 0: no end")
    parser.add_argument("--shard", default="0/1", help="which part of the work is done here, such as 0/2")
    add_on_option(parser)
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, default=WORK, help="cells, patches and pictures")
    parser.add_argument("--page", action="store_true", help=f"run nothing; write {PAGE.name} from what is there")
    chosen = parser.parse_args(argv)
    cells = Cells(chosen.work / "cells")
    if not chosen.page:
        budget = Budget(chosen.budget)
        work = Shard.parse(chosen.shard).part(jobs(chosen.solver or [*SOLVERS], chosen.concepts, chosen.pairs))
        counts = chosen.n or Counts(chosen.own, chosen.others, chosen.styles)
        with working_on(chosen.on) as executor:
            run(Bench(chosen.work, chosen.device, chosen.steps), cells, work, counts, budget, executor)
    _write(chosen, cells)


def _write(chosen: Namespace, cells: Cells) -> None:
    """The page where it was asked for, and a short table for whoever waits."""
    from benchmarks.choosing_page import filled, left_out, short_table
    from benchmarks.claims import measured_claims
    from benchmarks.composition import curves
    from benchmarks.solvers_page import short_rows, solvers_page

    found = cells.all()
    if chosen.page:
        write(PAGE, solvers_page(found, curves(chosen.work), measured_claims(chosen.work)).encode())
        if ASKED_BASE == "emoji":
            table = f"{short_table(found)}\n\n{left_out(found)}".rstrip()
            write(CHOOSING, filled(CHOOSING.read_text("utf-8"), table).encode())
    columns, rows = short_rows(found)
    title = "Judged right, per cent: erased concepts (low is good), others (high is good)"
    save(chosen.json, show(title, columns, rows))


if __name__ == "__main__":
    # Workers import this module; what is defined in `__main__` they could not find.
    from benchmarks.solvers import main as importable_main

    importable_main()
