"""The demo: the main job end to end on the embedded base, measured, in two tables and one report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from overpaint.bases.base import Base
from overpaint.bases.loading import quiet_loading, resolve_device
from overpaint.core.concepts import Concept
from overpaint.core.encoding import evenly_spaced
from overpaint.core.errors import AlreadyExists
from overpaint.core.reporting import Progress, silent
from overpaint.evaluation.context import ACCURACY, SHARE, EvalContext, EvaluatedPatch, Verdicts
from overpaint.evaluation.images import generate
from overpaint.evaluation.metrics import Measurement, verdict
from overpaint.evaluation.prompts import OBJECT, EvalPrompt, catalogue
from overpaint.evaluation.report_page import (
    Picture,
    PictureRow,
    Report,
    Section,
    Table,
    as_text,
    labelled_grid,
    percent,
    write_report,
)
from overpaint.evaluation.suites import ERASED_BAR, KEPT_BAR
from overpaint.workspace.evaluating import EvaluationRequest, open_context, versions
from overpaint.workspace.recipe import Recipe
from overpaint.workspace.solving import Solved
from overpaint.workspace.workspace import Workspace

__all__ = ["run"]


@dataclass(frozen=True)
class Check:
    """One line of the result: what was asked, what was measured, and whether it holds: yes, no, or not enough pictures."""

    what: str
    value: str
    bar: str
    holds: str


@dataclass
class Findings:
    """Everything that the tables and the report show: accuracies by concept, and under "kept" those of all other objects."""

    solved: dict[str, Solved] = field(default_factory=dict)
    on_base: dict[str, Measurement] = field(default_factory=dict)
    patched: dict[str, Measurement] = field(default_factory=dict)
    put_back: dict[str, Measurement] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    pictures: dict[str, list[NDArray[np.uint8]]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    prepare_seconds: float = 0.0

    @property
    def hold(self) -> bool:
        """Whether no check failed. Where there are not enough pictures to tell, none did."""
        return all(check.holds != "no" for check in self.checks)

    def check(self, what: str, value: str, bar: str, holds: bool | str) -> None:
        """Write down a check; a verdict in words stays as it is."""
        self.checks.append(Check(what, value, bar, holds if isinstance(holds, str) else "yes" if holds else "no"))

    def check_erased(self, verdicts: Mapping[str, Verdicts]) -> None:
        """Check how often the judge still sees the concepts: all together, and the worst of them."""
        name, worst = max(verdicts.items(), key=lambda item: float(item[1].right.mean()))
        together = Verdicts.joined([*verdicts.values()])
        for what, each in (("erased: all concepts together", together), (f"erased: worst, {name}", worst)):
            measured = each.accuracy().measurement(what, ACCURACY)
            self.check(what, as_text(measured), f"<= {ERASED_BAR:.0%}", verdict(measured, at_most=ERASED_BAR))

    def concept_table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and a row per concept: the judge's accuracy on the base, erased, put back; seconds and bytes."""
        rows = []
        for name, solved in self.solved.items():
            accuracies = (self.on_base[name], self.patched[name], self.put_back.get(name))
            cells = [f"{each.value:.0%}" if each else "" for each in accuracies]
            rows.append([name, solved.record.solver, *cells, f"{solved.seconds:.2f}", f"{solved.nbytes:,}"])
        before, after = (percent(each["kept"].value) for each in (self.on_base, self.patched))
        rows.append(["all others", "", before, f"{after} (kept)", "", "", ""])
        return ["concept", "solver", "base", "erased", "put back", "seconds", "bytes"], rows


SEPARABLE = (
    Concept("pistol", "unsafe", ("gun", "handgun"), anchor="banana"),
    Concept("dagger", "unsafe", ("knife", "blade"), anchor="key"),
    Concept("bomb", "unsafe", ("explosive",), anchor="apple"),
    Concept("cat", "object", ("kitty", "feline"), anchor="dog"),
    Concept("car", "object", ("automobile", "sedan"), anchor="bicycle"),
    Concept("ink", "style", anchor="flat"),
)
BY_SEPME = Concept("cigarette", "unsafe", ("tobacco",))
LISTED = 22
"""Objects that SepME leaves undisturbed. The text is wide enough for the names of some thirty."""
PUT_BACK = ("cat", "ink")
STEPS = 10
"""Of drawing; half the usual number, with which the judge recognises as many pictures of this base, in half the time."""
SHOWN = 7
"""Pictures of each concept in the report, spread over its prompts."""
SECONDS_BAR, BYTES_BAR = 1.0, 16 << 10


class Demo:
    """Runs the steps in order: solve, draw and judge, put back, build, remove everything."""

    def __init__(self, out: Path, quick: bool, progress: Progress, on_base: Callable[[Base], None]) -> None:
        self.out, self.progress = out, progress
        self.per_concept, self.per_kept = (3, 1) if quick else (20, 2)
        self.workspace = Workspace.open(out / "registry")
        self.workspace.on_base = on_base
        self.base = self.workspace.base(self.workspace.add_base("emoji", "emoji").name)
        self.concepts = (*SEPARABLE, BY_SEPME)
        self.findings = Findings()
        self.drawn = self.to_draw = 0

    def run(self) -> Findings:
        started = time.monotonic()
        recipe = self.solve()
        unpatched, pipe = self.base.pipeline(device=str(resolve_device("auto"))), recipe.pipeline()
        self.judge_all(unpatched, pipe)
        self.restore_two(recipe, pipe)
        self.build_and_reload(recipe, pipe)
        self.remove_everything(recipe, pipe, unpatched)
        self.findings.seconds = time.monotonic() - started
        return self.findings

    @cached_property
    def context(self) -> EvalContext:
        """What the suite `quick` chooses prompts and judges pictures with; asked for when everything is solved."""
        patches = [EvaluatedPatch(self.workspace.patch(solved.id)) for solved in self.findings.solved.values()]
        asked = EvaluationRequest(steps=STEPS)
        return open_context(self.workspace.registry, self.base, patches, asked, self.progress, fresh=True)

    @cached_property
    def prompts(self) -> dict[str, list[EvalPrompt]]:
        """By erased concept, and under "kept" those of every other object, none of which names what is erased."""
        asked = {c.name: self.context.prompts(*self.context.class_of(c), self.per_concept) for c in self.concepts}
        return asked | {"kept": self.context.prompts_for_others(OBJECT, self.per_kept)}

    def draw(self, pipe: Any, prompts: Sequence[EvalPrompt], text: str) -> NDArray[np.uint8]:
        self.progress(self.drawn, self.to_draw, text)
        before = self.drawn

        def report(count: int) -> None:
            self.drawn = before + count
            self.progress(self.drawn, self.to_draw, text)

        texts, seeds = [each.prompt for each in prompts], [each.seed for each in prompts]
        return generate(pipe, texts, seeds, self.context.image_generator.sampler, on_batch=report)

    def solve(self) -> Recipe:
        """A patch for each concept, all of them in one recipe."""
        for concept in self.concepts:
            self.workspace.registry.add_concept(concept, exist_ok=True)
        recipe = self.workspace.create_recipe("safe", base="emoji")
        started = time.perf_counter()
        self.workspace.prepare("emoji", progress=self.progress)
        self.findings.prepare_seconds = time.perf_counter() - started
        for step, concept in enumerate(self.concepts):
            solver = "sepme" if concept == BY_SEPME else "separable"
            self.progress(step, len(self.concepts), f"solving {concept.name} with {solver}")
            settings = self.sepme_settings() if solver == "sepme" else {}
            solved = self.workspace.solve(concept.name, base="emoji", solver=solver, settings=settings)
            self.findings.solved[concept.name] = solved
        for concept in self.concepts:
            recipe.add(self.findings.solved[concept.name], why="demo: takedown")
        self.findings.digests["base"] = self.base.fingerprint
        self.findings.digests["safe"] = recipe.digest()
        return recipe

    def sepme_settings(self) -> dict[str, str]:
        """As the paper has it: bare names, its stopping rule, and a null space of nothing but unused directions.

        What is left undisturbed beside the other erased concepts is listed: objects spread over the catalogue.
        """
        others = [name for name in catalogue().objects if name not in {c.name for c in self.concepts}]
        return {"preset": "emoji", "keep": "; ".join(evenly_spaced(others, LISTED)), "batch": "4"}

    def judge_all(self, unpatched: Any, pipe: Any) -> None:
        """The base and the recipe on the same prompts and seeds."""
        asked = self.prompts
        self.to_draw = 2 * sum(map(len, asked.values())) + sum(len(asked[name]) for name in PUT_BACK)
        self.to_draw += 2 * len(self.concepts) + 2 * sum(len(asked[c.name][:3]) for c in self.concepts)
        heads = {concept.name: self.context.class_of(concept)[0] for concept in self.concepts}
        erased = {}
        for name, prompts in asked.items():
            before = self.draw(unpatched, prompts, f"drawing {name} with the base")
            after = self.draw(pipe, prompts, f"drawing {name}, erased" if name != "kept" else "drawing what is kept")
            self.findings.pictures[f"{name} before"], self.findings.pictures[f"{name} after"] = (
                some(before),
                some(after),
            )
            verdicts = [self.context.judged(pictures, prompts, heads.get(name, OBJECT)) for pictures in (before, after)]
            rows = self.context.preserved(name, *verdicts)
            self.findings.on_base[name], self.findings.patched[name], share = rows
            if name == "kept":
                holds = verdict(share, at_least=KEPT_BAR)
                self.findings.check(f"kept: {SHARE}", as_text(share), f">= {KEPT_BAR:.0%}", holds)
            else:
                erased[name] = verdicts[1]
        self.findings.check_erased(erased)
        self._check_solving()

    def _check_solving(self) -> None:
        fast = [self.findings.solved[c.name] for c in SEPARABLE]
        seconds, size = max(s.seconds for s in fast), max(s.nbytes for s in fast)
        self.findings.check("separable: slowest concept", f"{seconds:.2f} s", "<= 1 s", seconds <= SECONDS_BAR)
        self.findings.check("separable: largest patch", f"{size / 1024:.1f} KiB", "<= 16 KiB", size <= BYTES_BAR)

    def restore_two(self, recipe: Recipe, pipe: Any) -> None:
        """Two patches removed again: the same bits as if they had never been added."""
        for name in PUT_BACK:
            recipe.remove(name, why="demo: licence deal")
        never = self.workspace.create_recipe("never-erased", base="emoji")
        for name, solved in self.findings.solved.items():
            if name not in PUT_BACK:
                never.add(solved)
        equal = recipe.digest() == never.digest()
        self.findings.check("two put back: weights as if never erased", recipe.digest()[:12], "equal digests", equal)
        for concept in (each for each in self.concepts if each.name in PUT_BACK):
            name, prompts = concept.name, self.prompts[concept.name]
            pictures = self.draw(pipe, prompts, f"drawing {name}, put back")
            judged = self.context.judged(pictures, prompts, self.context.class_of(concept)[0])
            self.findings.put_back[name] = judged.accuracy().measurement(name, ACCURACY)
            self.findings.pictures[f"{name} put back"] = some(pictures)

    def build_and_reload(self, recipe: Recipe, pipe: Any) -> None:
        """A checkpoint that plain diffusers loads, and whose pictures are those of the pipeline."""
        built = recipe.build(self.out / "checkpoint")
        with quiet_loading():
            from diffusers import StableDiffusionPipeline

            plain = StableDiffusionPipeline.from_pretrained(
                built.folder, dtype=pipe.unet.dtype, low_cpu_mem_usage=False
            )
        prompts = [self.prompts[c.name][0] for c in self.concepts]
        text = "comparing the checkpoint"
        same = bool(np.array_equal(self.draw(plain, prompts, text), self.draw(pipe, prompts, text)))
        value = "identical" if same else "different"
        self.findings.check("checkpoint in plain diffusers: pictures", value, "identical", same)

    def remove_everything(self, recipe: Recipe, pipe: Any, unpatched: Any) -> None:
        """An empty recipe is the base: weights and pictures."""
        for patch, _ in recipe.patches():
            recipe.remove(patch)
        self.findings.digests["all removed"] = recipe.digest()
        equal = recipe.digest() == self.base.fingerprint
        self.findings.check("all removed: weights", recipe.digest()[:12], "the base's digest", equal)
        prompts = [each for c in self.concepts for each in self.prompts[c.name][:3]]
        text = "comparing with the base"
        same = bool(np.array_equal(self.draw(unpatched, prompts, text), self.draw(pipe, prompts, text)))
        self.findings.check("all removed: pictures", "identical" if same else "different", "the base's", same)


def some(pictures: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The pictures that the report shows, evenly spread over all."""
    return list(pictures[np.linspace(0, len(pictures) - 1, min(SHOWN, len(pictures))).astype(int)])


def save_report(out: Path, demo: Demo, findings: Findings) -> None:
    """Write `report.html` and `overview.png` into `out`."""
    report = Report(
        title="Overpaint: what was erased, what was kept, what came back",
        intro="Seven concepts were erased from the embedded base, each by a patch of its own; two patches were removed "
        "again; a checkpoint was built; at last everything was removed. A patch hides a concept and does not destroy it: "
        "who holds the base can have it back, and published attacks can revive it in a checkpoint.",
        sections=tuple(_sections(findings)),
        provenance=tuple(_provenance(demo, findings)),
        commands=("overpaint demo",),
    )
    write_report(out / "report.html", report)
    _overview(findings).save(out / "overview.png")


def _sections(findings: Findings) -> Iterator[Section]:
    checks = tuple((check.what, check.value, check.bar, check.holds) for check in findings.checks)
    columns, promised = ("what", "measured", "bar", "holds"), "What was promised and what was measured"
    yield Section("Checks", table=Table(columns, checks, promised))

    def row(key: str, label: str, shows: str) -> PictureRow:
        shown = enumerate(findings.pictures[key], 1)
        return PictureRow(label, tuple(Picture(pixels, f"{shows}, picture {number}") for number, pixels in shown))

    on_base, patched, put_back = (
        {name: as_text(each) for name, each in accuracies.items()}
        for accuracies in (findings.on_base, findings.patched, findings.put_back)
    )
    pictures = []
    for name in findings.solved:
        pictures.append(row(f"{name} before", f"{name}: base", f"The base asked for {name}"))
        pictures.append(row(f"{name} after", f"{name}: erased", f"The safe recipe asked for {name}"))
    rows = tuple(
        (name, each.record.solver, on_base[name], patched[name], f"{each.seconds:.2f} s", f"{each.nbytes:,}")
        for name, each in findings.solved.items()
    )
    yield Section(
        "Erased",
        "The judge is a small classifier trained on drawings, never on generated pictures. Prompts are from templates that "
        "training did not see. Each pair of rows has the same prompts and the same seeds.",
        Table(("concept", "solver", "base", "erased", "time", "bytes"), rows, "Accuracy with 95% intervals"),
        pictures=tuple(pictures),
    )
    others = (
        row("kept before", "others: base", "The base asked for other objects"),
        row("kept after", "others: all patches", "The safe recipe asked for other objects"),
    )
    text = f"All other objects: {patched['kept']} with all seven patches, {on_base['kept']} on the base."
    yield Section("Kept", text, pictures=others)
    yield Section(
        "Put back",
        "Their patches were removed from the recipe and the weights composed again; the other five stay.",
        Table(
            ("concept", "base", "put back"),
            tuple((name, on_base[name], accuracy) for name, accuracy in put_back.items()),
            "Accuracy with 95% intervals",
        ),
        pictures=tuple(row(f"{n} put back", f"{n}: put back", f"{n} after its patch was removed") for n in put_back),
    )


def _provenance(demo: Demo, findings: Findings) -> Iterator[tuple[str, str]]:
    yield from ((f"weights, {name}", digest) for name, digest in findings.digests.items())
    yield from ((f"patch, {name}", solved.id) for name, solved in findings.solved.items())
    yield "vocabulary and concepts, encoded once", f"{findings.prepare_seconds:.2f} s"
    sampler = demo.context.image_generator.sampler
    yield "sampler", f"DDIM, {sampler.steps} steps, guidance {sampler.guidance:g}"
    yield "judge", demo.context.judge.name
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions().items())
    yield "threads", str(torch.get_num_threads())


def _overview(findings: Findings) -> Image.Image:
    """One labelled picture: the base, all patches, and the two concepts that were put back."""
    shown, pictures = list(findings.solved), findings.pictures
    other_before, other_after = (pictures[f"kept {when}"][SHOWN // 2] for when in ("before", "after"))
    rows = [
        ("base", [*(pictures[f"{n} before"][0] for n in shown), other_before]),
        ("seven patches", [*(pictures[f"{n} after"][0] for n in shown), other_after]),
        (
            "two removed again",
            [*(pictures.get(f"{n} put back", pictures[f"{n} after"])[0] for n in shown), other_after],
        ),
    ]
    return labelled_grid(rows, [*shown, "another object"], scale=2, title="")


def run(
    out: Path,
    *,
    quick: bool = False,
    progress: Progress = silent,
    on_base: Callable[[Base], None] = lambda base: None,
) -> Findings:
    """Run the demo into the new folder `out` and write its report; nothing is left there when it does not come to its end.

    Raises AlreadyExists when `out` is there and not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise AlreadyExists(f"{out} is not empty; name another folder with -o, or remove it")
    try:
        demo = Demo(out, quick, progress, on_base)
        findings = demo.run()
        save_report(out, demo, findings)
    except BaseException:
        # Half a demo is of no use, and in the way of the next one.
        shutil.rmtree(out, ignore_errors=True)
        raise
    return findings
