"""Putting a report together: the latest run of every suite, pictures for the same seeds, where it all comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overpaint.bases.loading import resolve_device
from overpaint.core.errors import AlreadyExists, OverpaintError
from overpaint.evaluation.context import EvaluatedPatch
from overpaint.evaluation.images import ImageCache, ImageGenerator, Sampler
from overpaint.evaluation.prompts import OBJECT, EvalPrompt, PromptSet
from overpaint.evaluation.reports import sections
from overpaint.evaluation.reports.html import Picture, PictureRow, Report, Section, Table, write_report
from overpaint.evaluation.reports.sections import Numbers, crosstalk, save_figures, save_numbers
from overpaint.patches.compose import Term
from overpaint.registry.registry import EvaluationRecord
from overpaint.workspace.evaluating import prompt_set_of
from overpaint.workspace.recipe import Recipe

if TYPE_CHECKING:
    from overpaint.workspace.workspace import Workspace


SHOWN = 6
"""Pictures in a row."""


@dataclass(frozen=True)
class Reported:
    """The files that were written, the page first, and what was left out and why."""

    files: tuple[Path, ...]
    notices: tuple[str, ...]


def report(
    workspace: Workspace,
    name: str,
    out: Path,
    *,
    device: str = "auto",
    progress: Callable[[int, int, str], None] = lambda done, of, text: None,
) -> Reported:
    """Write `out` (HTML) about a recipe, and beside it its numbers as JSON and CSV and its figures as PNG.

    Everything is read from the registry except for the pictures, which are drawn (or taken from the cache of the last
    evaluation). Raises NotFound for an unknown recipe, OverpaintError when it was never evaluated, AlreadyExists when one
    of the files is there.
    """
    recipe = workspace.known_recipe(name)
    records = recipe.evaluations()
    if not records:
        raise OverpaintError(f"recipe {name!r} was not evaluated as it is now; run `overpaint evaluate {name}` first")
    _refuse_existing(out)
    found = {record.suite: Numbers(record) for record in records}
    drawn = _Drawn.of(workspace, recipe, records, device, progress)
    write_report(out, _page(recipe, found, drawn))
    figures, notices = save_figures(out, found)
    return Reported((out, *save_numbers(out, records), *figures), tuple(notices))


def _refuse_existing(out: Path) -> None:
    if not out.absolute().parent.is_dir():
        raise OverpaintError(f"there is no folder {out.absolute().parent} to write {out.name} in; make it first")
    beside = [out, *(out.with_suffix(suffix) for suffix in (".json", ".csv")), *out.parent.glob(f"{out.stem}-*.png")]
    if taken := [path for path in beside if path.exists()]:
        raise AlreadyExists(f"{taken[0]} is already there; name another file")


@dataclass(frozen=True)
class _Drawn:
    """The rows of pictures of the page."""

    erased: tuple[PictureRow, ...]
    kept: tuple[PictureRow, ...]
    restored: tuple[PictureRow, ...]

    @classmethod
    def of(
        cls,
        workspace: Workspace,
        recipe: Recipe,
        records: Sequence[EvaluationRecord],
        device: str,
        progress: Callable[[int, int, str], None],
    ) -> _Drawn:
        base, where, made = recipe.base, resolve_device(device), records[-1]
        steps, guidance = made.settings["sampler"]["steps"], made.settings["sampler"]["guidance"]
        image_cache = ImageCache(workspace.registry.folder / "cache" / "pictures")
        image_generator = ImageGenerator(base, Sampler(steps, guidance), image_cache, where, progress)
        held = [EvaluatedPatch(workspace.patch(record.id), strength) for record, strength in recipe.patches()]
        prompt_set = prompt_set_of(base, (*workspace.concepts(), *(each.concept for each in held)))
        return cls(*_rows(image_generator, prompt_set, held, made.seed))


def _rows(
    image_generator: ImageGenerator, prompt_set: PromptSet, held: Sequence[EvaluatedPatch], seed: int
) -> tuple[tuple[PictureRow, ...], ...]:
    terms, classes = [each.term for each in held], [prompt_set.class_of(each.concept) for each in held]
    questions = [prompt_set.ask(head, name, SHOWN, seed) for head, name in classes]
    free = [name for name in prompt_set.names(OBJECT) if (OBJECT, name) not in classes]
    wanted = min(SHOWN, len(free))
    others = [prompt_set.ask(OBJECT, free[i * len(free) // wanted], 1, seed)[0] for i in range(wanted)]
    image_generator.expect(2 * (sum(map(len, questions)) + len(others)) + SHOWN)
    erased: list[PictureRow] = []
    for (_, name), asked in zip(classes, questions, strict=True):
        erased += [
            _row(image_generator, (), asked, f"{name}: base"),
            _row(image_generator, terms, asked, f"{name}: erased"),
        ]
    kept = [
        _row(image_generator, (), others, "others: base"),
        _row(image_generator, terms, others, "others: recipe on"),
    ]
    first = f"{classes[0][1]}: taken off"
    restored = [
        _row(image_generator, (), questions[0], f"{classes[0][1]}: base"),
        _row(image_generator, terms[1:], questions[0], first),
    ]
    return tuple(erased), tuple(kept), tuple(restored)


def _row(image_generator: ImageGenerator, terms: Sequence[Term], asked: Sequence[EvalPrompt], label: str) -> PictureRow:
    pictures = image_generator.draw(terms, asked)
    output = (f"{label}; prompt: {question.prompt}; seed {question.seed}" for question in asked)
    return PictureRow(label, tuple(Picture(p, alt) for p, alt in zip(pictures, output, strict=True)))


def _page(recipe: Recipe, found: dict[str, Numbers], drawn: _Drawn) -> Report:
    record = recipe.record
    parts: list[Section] = [
        sections.summary(found),
        sections.erased(found, (), drawn.erased),
        sections.kept(found, (), drawn.kept),
        sections.restored(found, (), drawn.restored),
    ]
    if "crosstalk" in found:
        parts.append(crosstalk(found["crosstalk"]))
    if "scale" in found:
        parts.append(sections.scale(found["scale"]))
    if "probes" in found:
        parts.append(sections.probes(found["probes"]))
    parts += [sections.cost(found, _patches(recipe)), sections.limits()]
    names = ", ".join(f"{patch.concept}" for patch, _ in recipe.patches())
    return Report(
        title=f"Recipe {record.name}: what it erases, keeps and gives back",
        intro=f"Recipe {record.name}, revision {record.revision}, lays {len(record.laid)} patches on the base {record.base}. "
        f"Erased are: {names}. Every number says how many pictures it is of, and its 95% interval.",
        sections=tuple(parts),
        provenance=_provenance(recipe, found),
        commands=tuple(_command(record.name, each.record) for each in found.values()),
    )


def _patches(recipe: Recipe) -> Table:
    rows = tuple(
        (p.concept, p.solver, f"{strength:g}", f"{p.nbytes:,}", f"{p.seconds:.2f} s")
        for p, strength in recipe.patches()
    )
    return Table(("concept", "solver", "strength", "bytes", "solved in"), rows, "The patches of the recipe")


def _provenance(recipe: Recipe, found: dict[str, Numbers]) -> tuple[tuple[str, str], ...]:
    pairs = [("base fingerprint", recipe.base.fingerprint), ("weights of the recipe", recipe.digest())]
    for patch, _ in recipe.patches():
        settings = ", ".join(f"{key} {value}" for key, value in patch.settings.items())
        pairs.append((f"patch for {patch.concept}", f"{patch.id} ({patch.solver}: {settings}; seed {patch.seed})"))
    for suite, numbers in found.items():
        made = numbers.record
        sampler = ", ".join(f"{key} {value}" for key, value in made.settings["sampler"].items())
        software = ", ".join(f"{key} {value}" for key, value in made.versions.items())
        output = f"judge {made.judge}; seed {made.seed}; {sampler}; {made.seconds:.0f} s; {software}"
        pairs.append((f"{suite}, {made.at.isoformat(timespec='seconds')} by {made.who}", output))
    return tuple(pairs)


def _command(name: str, made: EvaluationRecord) -> str:
    sampler = made.settings["sampler"]
    chosen = "".join(f" --set '{key}={value}'" for key, value in made.settings["suite"].items() if value != "")
    judge = f" --judge {made.settings['judge']}" if made.settings.get("judge") else ""
    prompts = f" --prompts {made.settings['prompts']}" if made.settings.get("prompts") else ""
    drawn = f" --steps {sampler['steps']} --guidance {sampler['guidance']:g} --seed {made.seed}"
    return f"overpaint evaluate {name} --suite {made.suite}{chosen}{judge}{prompts}{drawn}"
