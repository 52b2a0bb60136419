"""What a recipe's patches erase, leave and give back, judged by pictures: quick, and by the protocols of published papers.

The prompts are a context's, so that all of these suites ask alike; what each measures, and how it differs from the published
protocol, stands at its class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from overpaint.core.concepts import Concept
from overpaint.core.encoding import evenly_spaced
from overpaint.core.errors import OverpaintError
from overpaint.evaluation.context import (
    ACCURACY,
    CHANGE,
    DISTANCE,
    ON_BASE,
    SHARE,
    WRONG,
    EvalContext,
    EvaluatedPatch,
    Verdicts,
)
from overpaint.evaluation.metrics import (
    Mean,
    Measurement,
    average,
    differences,
    frechet_distance,
    h_object,
    mean,
    measured,
    psnr,
    unlearning_accuracy,
)
from overpaint.evaluation.prompts import OBJECT, STYLE, EvalPrompt
from overpaint.evaluation.suites import Suite
from overpaint.patches.compose import Term


@dataclass(frozen=True)
class Quick(Suite):
    """Is it erased, is the rest preserved, does it come back? About 250 pictures, a minute on the embedded base.

    Restoring is tested twice: half of the patches are removed and their concepts judged again, and every weight of the live
    pipeline is compared bit for bit with what it would be had they never been applied.

    Its settings are how many pictures are judged: of each erased concept at most, of each other object, of each other style;
    and of all erased concepts together at most.
    """

    erased: int = 10
    objects: int = 1
    styles: int = 3
    together: int = 40

    def run(self, context: EvalContext) -> list[Measurement]:
        each = max(1, min(self.erased, self.together // len(context.patches)))
        erased = {key: context.prompts(*key, each) for key in context.erased()}
        others = {head: context.prompts_for_others(head, getattr(self, f"{head}s")) for head in (OBJECT, STYLE)}
        removed = context.patches[::2] if len(context.patches) > 1 else context.patches
        restored = {key: erased[key] for key in context.erased(removed)}
        count = 2 * sum(map(len, (*erased.values(), *others.values()))) + sum(map(len, restored.values()))
        context.image_generator.expect(count)
        terms = context.terms()
        rows: list[Measurement] = []
        for (head, name), prompts in erased.items():
            before = context.on_base(prompts, head, name)
            rows += context.compared(f"erased: {name}", before, context.verdicts(terms, prompts, head))
        for head, prompts in others.items():
            if prompts:
                before = context.on_base(prompts, head, f"the other {head}s")
                rows += context.preserved(f"kept: other {head}s", before, context.verdicts(terms, prompts, head))
        return rows + _taken_off(context, context.terms(p for p in context.patches if p not in removed), restored)


def _taken_off(
    context: EvalContext, rest: list[Term], restored: dict[tuple[str, str], list[EvalPrompt]]
) -> list[Measurement]:
    """After all patches were applied, only `rest` still is: the weights, and the concepts whose patches were removed."""
    context.image_generator.overlay.set(context.terms())
    weights = context.wrong_tensors(rest, "restored: weights")
    before, after = (
        Verdicts.joined([context.verdicts(terms, prompts, head) for (head, _), prompts in restored.items()])
        for terms in ((), rest)
    )
    return [weights, *context.preserved("restored: concepts taken off", before, after)]


HEADS = (STYLE, OBJECT)


@dataclass(frozen=True)
class Grid(Suite):
    """Every object in every style, for each patch alone (UnlearnCanvas, Zhang et al., NeurIPS 2024).

    UA is the share of the erased concept's pictures that are no longer taken for it, IRA the accuracy of the other concepts of
    its kind, CRA that of the other kind, each averaged over the patches. Beside them: retention in the prompt (the object of
    pictures whose style was erased, and the reverse) and the probability that the judge still gives the erased concept.

    Differences to the published protocol: the judge and the sampler are this base's, guidance is the base's own, there is no
    class without a style, and the objects are a part of the catalogue.

    Its settings are how many objects the grid has (the erased ones among them), and how many seeds each cell has.
    """

    objects: int = 20
    seeds: int = 1

    def run(self, context: EvalContext) -> list[Measurement]:
        prompts = self._prompts(context)
        context.image_generator.expect(len(prompts) * (1 + len(context.patches)))
        base = {head: context.on_base(prompts, head, f"the {head}s of the grid") for head in HEADS}
        rows = [base[head].accuracy(context.seed).measurement(f"base: {head}s", ACCURACY) for head in HEADS]
        alone = [self._alone(context, patch, prompts) for patch in context.patches]
        for patch, means in zip(context.patches, alone, strict=True):
            subject = f"{patch.concept.name} ({patch.solver})"
            rows += [mean.measurement(subject, metric) for metric, mean in means.items()]
        for metric in alone[0]:
            whole = average([means[metric] for means in alone])
            rows.append(whole.measurement("average of the patches", metric))
        return rows

    def _prompts(self, context: EvalContext) -> list[EvalPrompt]:
        """The judge's styles times the erased objects and others spread over the catalogue."""
        styles = [style for style in context.prompt_set.names(STYLE) if style in context.judge.heads.get(STYLE, ())]
        erased = [name for head, name in context.erased() if head == OBJECT]
        others = evenly_spaced(context.others(OBJECT), max(2, self.objects - len(erased)))
        return context.prompt_set.grid(styles, [*erased, *others], self.seeds, context.seed)

    def _alone(self, context: EvalContext, patch: EvaluatedPatch, prompts: Sequence[EvalPrompt]) -> dict[str, Mean]:
        """UA, IRA, CRA and what belongs to them, with one patch alone on the base."""
        head, name = context.class_of(patch.concept)
        other = STYLE if head == OBJECT else OBJECT
        seen = {each: context.verdicts([patch.term], prompts, each) for each in HEADS}

        def showing(wanted: str) -> list[int]:
            return [i for i, prompt in enumerate(prompts) if prompt.shows[head] == wanted]

        erased = seen[head].only(showing(name))
        classes = sorted({prompt.shows[head] for prompt in prompts} - {name})
        return {
            "UA": _complement(erased.accuracy(context.seed)),
            "IRA": average([seen[head].only(showing(each)).accuracy(context.seed) for each in classes]),
            "CRA": seen[other].accuracy(context.seed),
            "retention in the prompt": seen[other].only(showing(name)).accuracy(context.seed),
            "probability of the erased concept": erased.mean_probability(context.seed),
        }


def _complement(accuracy: Mean) -> Mean:
    hits = None if accuracy.hits is None else accuracy.n - accuracy.hits
    return Mean(unlearning_accuracy(accuracy.draws), accuracy.n, hits)


@dataclass(frozen=True)
class Generality(Suite):
    """Erased under other names too, and nothing lost that nobody listed (MACE, Lu et al., CVPR 2024).

    Acc_e is the accuracy on the erased objects, Acc_g that on their synonyms, Acc_s that on all other objects; H_o is their
    harmonic mean, after turning the first two round. The others are also shown apart: those that a solver knew of, and those
    that only its vocabulary preserves.

    Differences to the published protocol: all patches are applied at once, accuracy is that of the judge's first choice, and
    objects are this base's.

    Its settings are how many pictures are judged of each erased object, of each of its synonyms, and of each other object.
    """

    erased: int = 10
    synonyms: int = 6
    others: int = 3

    def run(self, context: EvalContext) -> list[Measurement]:
        erased = [name for head, name in context.erased() if head == OBJECT]
        if not erased:
            raise OverpaintError(
                "generality is about objects and their synonyms, and no patch here erases one; use grid"
            )
        by_name = [prompt for name in erased for prompt in context.prompts(OBJECT, name, self.erased)]
        synonyms = [
            prompt
            for name in erased
            for prompt in context.prompt_set.synonym_prompts(name, self.synonyms, context.seed)
        ]
        others = context.prompts_for_others(OBJECT, self.others)
        context.image_generator.expect(2 * (len(by_name) + len(synonyms) + len(others)))
        erased_rows, acc_e = self._judged(context, "erased objects: Acc_e", by_name)
        other_rows, acc_s = self._judged(context, "other objects: Acc_s", others)
        if not synonyms:
            return [*erased_rows, *other_rows]
        synonym_rows, acc_g = self._judged(context, "synonyms of erased objects: Acc_g", synonyms)
        n = len(by_name) + len(synonyms) + len(others)
        rows = [*erased_rows, *synonym_rows, *other_rows, measured("recipe", "H_o", h_object(acc_e, acc_s, acc_g), n)]
        known = frozenset().union(*(patch.known_words for patch in context.patches))
        for subject, prompts in (
            ("synonyms the solvers were told of", [p for p in synonyms if _has_word(p, known)]),
            ("synonyms the solvers never heard", [p for p in synonyms if not _has_word(p, known)]),
            ("other objects the solvers were told of", [p for p in others if _has_word(p, known)]),
            ("other objects the solvers never heard of", [p for p in others if not _has_word(p, known)]),
        ):
            if prompts:
                rows += self._judged(context, subject, prompts)[0]
        return rows

    def _judged(
        self, context: EvalContext, subject: str, prompts: list[EvalPrompt]
    ) -> tuple[list[Measurement], NDArray[np.float64]]:
        before = context.on_base(prompts, OBJECT, subject.partition(":")[0])
        after = context.verdicts(context.terms(), prompts, OBJECT)
        return context.preserved(subject, before, after), after.accuracy(context.seed).draws


def _has_word(prompt: EvalPrompt, words: frozenset[str]) -> bool:
    return bool(words & set(re.findall(r"\w+", prompt.prompt.casefold())))


CONCEPTS = 6
SCENES: tuple[tuple[str, ...], ...] = (
    ("012345", "2345", "345"),
    ("012345", "0125", "012"),
    ("024", "24", "124", "14", "134", "13", "135"),
    ("012", "12", "1234", "234", "2345", "345"),
)
"""Which of c0 to c5 are erased after each step."""
Prompts = dict[tuple[str, str], list[EvalPrompt]]


@dataclass(frozen=True)
class Scenes(Suite):
    """Six concepts erased, restored and erased again in four orders (SRS-ME, Zhao et al., after SepME).

    In Scene 1 all six are erased, then c0 and c1 restored, then c2; Scene 2 does the same with c3, c4 and c5; in Scene 3
    concepts are restored and erased in turn; Scene 4 erases three and goes on. After every step the erased, the restored and
    the regular concepts (never erased) are judged, their pictures compared with the base's for the same seeds, and every weight
    of the live pipeline compared bit for bit with a composition of the applied patches, as if the restored ones had never been
    applied; at the end of a scene all are restored, and the weights must be the base's. A concept's prompts name no other
    erased one, so that its own patch decides about its pictures. With twelve patches or more, each c is two.

    Differences to the paper: pictures per concept are fewer, distances are in the judge's features and not Inception's, and
    pictures are compared by their difference and PSNR instead of LPIPS.

    Its settings are how many pictures are judged of each concept after each step, and how many regular concepts there are.
    """

    pictures: int = 6
    regular: int = 3

    def run(self, context: EvalContext) -> list[Measurement]:
        groups = _six_groups(context.patches)
        members = [patch for group in groups for patch in group]
        prompts: Prompts = {key: self._asked(context, *key, each) for key, each in context.erased(members).items()}
        regular = self._regular(context)
        steps = {step for scene in SCENES for step in scene}
        context.image_generator.expect(sum(map(len, (*prompts.values(), *regular.values()))) * (1 + len(steps)))
        rows = []
        for number, scene in enumerate(SCENES, 1):
            erased_before: set[str] = set()
            for time, step in enumerate(scene):
                erased_before |= set(step)
                applied = [patch for i in step for patch in groups[int(i)]]
                removed = [patch for i in sorted(erased_before - set(step)) for patch in groups[int(i)]]
                where = f"scene {number}, t{time}"
                rows.append(context.wrong_tensors(context.terms(applied), f"{where}: weights"))
                for label, judged in (
                    ("erased", {key: prompts[key] for key in context.erased(applied)}),
                    ("restored", {key: prompts[key] for key in context.erased(removed)}),
                    ("regular", regular),
                ):
                    if judged:
                        rows += _judged_pictures(context, applied, judged, f"{where}: {label}")
            rows.append(context.wrong_tensors([], f"scene {number}, all restored: weights"))
        return [*rows, *_worst_steps(rows)]

    def _asked(self, context: EvalContext, head: str, name: str, concept: Concept) -> list[EvalPrompt]:
        """The prompts for an erased concept, whose pictures are judged as the class `name` of a head."""
        return context.prompts_alone(head, name, self.pictures)

    def _regular(self, context: EvalContext) -> Prompts:
        names = evenly_spaced(context.others(OBJECT), self.regular)
        prompts = {(OBJECT, name): context.neutral_prompts(OBJECT, name, self.pictures) for name in names}
        return {key: some for key, some in prompts.items() if some}


@dataclass(frozen=True)
class ScenesByName(Scenes):
    """The four scenes of SRS-ME, in which every concept is asked for by its bare name, as in the paper's own tables.

    That is what SepME is trained on; sentences about a concept are another question, which the suite `scenes` asks. All
    pictures of a concept share one prompt, so that intervals are over concepts.
    """

    def run(self, context: EvalContext) -> list[Measurement]:
        if context.own_prompts:
            raise OverpaintError(
                "the suite scenes_by_name asks by bare names; leave --prompts out, or take the suite scenes"
            )
        return super().run(context)

    def _asked(self, context: EvalContext, head: str, name: str, concept: Concept) -> list[EvalPrompt]:
        return _by_name(context, head, name, concept.name, self.pictures)

    def _regular(self, context: EvalContext) -> Prompts:
        every = {name: _by_name(context, OBJECT, name, name, self.pictures) for name in context.others(OBJECT)}
        clear = [name for name, prompts in every.items() if prompts and not context.names_erased(prompts[0])]
        return {(OBJECT, name): every[name] for name in evenly_spaced(clear, self.regular)}


def _by_name(context: EvalContext, head: str, class_name: str, name: str, count: int) -> list[EvalPrompt]:
    """The bare name as the prompt for a class, once for each seed that its sentences would have."""
    return [replace(each, prompt=name, shows={head: class_name}) for each in context.prompts(head, class_name, count)]


def _six_groups(patches: Sequence[EvaluatedPatch]) -> list[list[EvaluatedPatch]]:
    """The patches that stand for c0 to c5."""
    if len(patches) < CONCEPTS:
        raise OverpaintError(f"the scenes need {CONCEPTS} patches, as in the paper; this recipe has {len(patches)}")
    each = len(patches) // CONCEPTS
    return [list(patches[i * each : (i + 1) * each]) for i in range(CONCEPTS)]


def _judged_pictures(
    context: EvalContext, applied: Sequence[EvaluatedPatch], prompts: Prompts, subject: str
) -> list[Measurement]:
    """Accuracy, distance and change of the pictures of some concepts while `applied` are."""
    terms, before, after = context.terms(applied), [], []
    for (head, name), some in prompts.items():
        before.append(context.on_base(some, head, name))
        after.append(context.verdicts(terms, some, head))
    compare = context.compared if subject.endswith(": erased") else context.preserved
    rows = compare(subject, Verdicts.joined(before), Verdicts.joined(after))
    every = [prompt for some in prompts.values() for prompt in some]
    pictures, originals = context.image_generator.draw(terms, every), context.image_generator.draw((), every)
    sentences = [prompt.prompt for prompt in every]
    far = frechet_distance(context.judge.features(pictures), context.judge.features(originals))
    rows.append(Measurement(subject, DISTANCE, far, len(every)))
    for metric, values in ((CHANGE, differences(pictures, originals)), ("PSNR, dB", psnr(pictures, originals))):
        rows.append(measured(subject, metric, mean(values, sentences, context.seed).draws, len(every)))
    return rows


def _worst_steps(rows: Iterable[Measurement]) -> Iterable[Measurement]:
    """Over all scenes and steps: the most that is left of what was erased, the least of what was not."""
    every = list(rows)
    for label, metric, worst in (
        ("erased", ACCURACY, max),
        ("restored", SHARE, min),
        ("restored", CHANGE, max),
        ("regular", SHARE, min),
        ("weights", WRONG, max),
    ):
        values = [row.value for row in every if row.subject.endswith(f": {label}") and row.metric == metric]
        if values:
            yield Measurement(f"all scenes, worst step: {label}", metric, worst(values), len(values))
    base = [row.value for row in every if row.metric == ON_BASE]
    yield Measurement("all scenes: base", ACCURACY, float(np.mean(base)), len(base))
