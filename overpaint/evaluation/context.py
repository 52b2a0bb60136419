"""What a suite works with: patches on a base, prompts, an image generator and a judge.

All suites choose prompts, draw and judge through an `EvalContext`: the same prompts, the same refusal of a judge that cannot
recognise a class, the same intervals.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.evaluation.images import ImageGenerator
from overpaint.evaluation.judges import Judge
from overpaint.evaluation.metrics import Mean, Measurement, mean, measured
from overpaint.evaluation.prompts import OBJECT, EvalPrompt, PromptSet
from overpaint.patches.compose import Term, plan
from overpaint.patches.delta import identical
from overpaint.patches.live import Parameters
from overpaint.patches.patch import Patch

BLIND = 0.4
"""A class that a judge finds in less of the base's own pictures is not scored; SRS-ME left out a class by this rule."""
ON_BASE, ACCURACY, SHARE = "accuracy on the base", "accuracy", "share of the base's accuracy"
DISTANCE = "distance in the judge's features"
"""What the Frechet distance is called here: it is not FID, whose features are Inception's."""
CHANGE = "change of the pictures"
"""The root mean square difference to the base's pictures for the same seeds, in grey levels; 0 is no change at all."""
WRONG = "tensors that differ in any bit"
_SPARE = 4
"""Times as many prompts as are wanted, so that enough are left without those that name something else."""


class BlindJudge(OverpaintError):
    """A judge that does not recognise in the base's own pictures what they show, so that its verdicts mean nothing."""


@dataclass(frozen=True, eq=False)
class EvaluatedPatch:
    """A patch under evaluation: its strength, the seconds it took to solve, and its bytes."""

    patch: Patch
    strength: float = 1.0
    seconds: float = 0.0
    nbytes: int = 0

    @property
    def concept(self) -> Concept:
        return self.patch.concept

    @property
    def term(self) -> Term:
        return Term(self.patch.id, self.patch.delta, self.strength)

    @property
    def solver(self) -> str:
        """The name of the solver that made the patch."""
        return str(self.patch.manifest["solver"].get("name", "unknown"))

    @property
    def known_words(self) -> frozenset[str]:
        """The words, in lower case, of every concept that the patch's solver knew of: its own and its universe's."""
        known = (self.concept, *self.patch.universe)
        return frozenset(word.casefold() for concept in known for word in (*concept.words, concept.anchor) if word)


@dataclass(frozen=True, eq=False)
class Verdicts:
    """What a judge saw in pictures, one entry each: 1 where it shows what its prompt asked for, the probability that the
    judge gave to that, and the prompt."""

    right: NDArray[np.float64]
    probability: NDArray[np.float64]
    prompts: list[str]

    def accuracy(self, seed: int = 0) -> Mean:
        return mean(self.right, self.prompts, seed)

    def mean_probability(self, seed: int = 0) -> Mean:
        """The mean probability of the class that was asked for: finer than accuracy, which counts in steps."""
        return mean(self.probability, self.prompts, seed)

    def only(self, chosen: Sequence[int]) -> Verdicts:
        """The verdicts on some of the pictures, by their index."""
        return Verdicts(self.right[chosen], self.probability[chosen], [self.prompts[i] for i in chosen])

    @classmethod
    def joined(cls, parts: Sequence[Verdicts]) -> Verdicts:
        """Several verdicts as one."""
        right, probability = (np.concatenate([getattr(p, name) for p in parts]) for name in ("right", "probability"))
        return cls(right, probability, [prompt for part in parts for prompt in part.prompts])


@dataclass(frozen=True, eq=False)
class EvalContext:
    """One evaluation: a base, the patches on it, and who draws and judges.

    `own_prompts`, by head and class, take the place of the prompt set's; `known` are all concepts of the registry.
    """

    base: Base
    prompt_set: PromptSet
    judge: Judge
    image_generator: ImageGenerator
    patches: tuple[EvaluatedPatch, ...]
    known: tuple[Concept, ...] = ()
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    own_prompts: Mapping[tuple[str, str], list[EvalPrompt]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.patches:
            raise OverpaintError("there is no patch to evaluate; add one to the recipe first")
        self.erased()  # raises where a concept cannot be judged

    # Prompts

    def class_of(self, concept: Concept) -> tuple[str, str]:
        """The head and class that a concept is judged by. Raises NotFound when prompt set or judge lack it."""
        head, name = self.prompt_set.class_of(concept)
        if name not in self.judge.heads.get(head, ()):
            known = ", ".join(self.judge.heads.get(head, ())) or "nothing"
            raise NotFound(f"the judge {self.judge.name} does not recognise the {head} {name!r} (it knows {known})")
        return head, name

    def erased(self, patches: Iterable[EvaluatedPatch] | None = None) -> dict[tuple[str, str], Concept]:
        """The concepts that the patches (or all of them) erase, by head and class."""
        return {self.class_of(each.concept): each.concept for each in (self.patches if patches is None else patches)}

    def others(self, head: str) -> list[str]:
        """The classes of a head that no patch here erases, and that the judge knows."""
        erased = self.erased()
        known = self.judge.heads.get(head, ())
        return [name for name in self.prompt_set.names(head) if (head, name) not in erased and name in known]

    def prompts(self, head: str, name: str, count: int) -> list[EvalPrompt]:
        """`count` prompts for one class; one's own prompts instead, all of them, where there are any."""
        if self.own_prompts:
            return self.own_prompts.get((head, name), [])
        return self.prompt_set.prompts(head, name, count, self.seed)

    def neutral_prompts(self, head: str, name: str, count: int) -> list[EvalPrompt]:
        """Prompts for one class, without those whose sentence names what is erased."""
        return [prompt for prompt in self.prompts(head, name, count) if not self.names_erased(prompt)]

    def prompts_alone(self, head: str, name: str, count: int) -> list[EvalPrompt]:
        """Prompts for one class that name nothing else which is erased: its patch alone decides about their pictures."""
        prompts = self.prompts(head, name, _SPARE * count)
        clear = [prompt for prompt in prompts if not self.names_erased(prompt, (head, name))]
        return (clear or prompts)[:count]

    def prompts_for_others(self, head: str, count: int) -> list[EvalPrompt]:
        """Neutral prompts for every other class of a head."""
        return [prompt for name in self.others(head) for prompt in self.neutral_prompts(head, name, count)]

    def names_erased(self, prompt: EvalPrompt, but: tuple[str, str] | None = None) -> bool:
        """Whether a sentence has a word of an erased concept, other than those of the class `but`."""
        words = set(re.findall(r"\w+", prompt.prompt.casefold()))
        return any(
            set(re.findall(r"\w+", word.casefold())) <= words
            for patch in self.patches
            if (key := self.class_of(patch.concept)) != but
            for word in (*self.prompt_set.classes[key[0]][key[1]], key[1], *patch.concept.words)
        )

    # Pictures and what the judge sees in them

    def terms(self, patches: Iterable[EvaluatedPatch] | None = None) -> list[Term]:
        """The terms of some of the patches, or of all of them."""
        return [each.term for each in (self.patches if patches is None else patches)]

    def verdicts(self, terms: Sequence[Term], prompts: Sequence[EvalPrompt], head: str = OBJECT) -> Verdicts:
        """What the judge sees in the pictures of `prompts` under `terms`. Raises OverpaintError without a prompt."""
        if not prompts:
            raise OverpaintError(
                f"there is no prompt for any {head} here; give some with --prompts, or ask for more pictures"
            )
        return self.judged(self.image_generator.draw(terms, prompts), prompts, head)

    def judged(self, pictures: NDArray[np.uint8], prompts: Sequence[EvalPrompt], head: str = OBJECT) -> Verdicts:
        """Whether each of `pictures`, uint8 [n, h, w, 3], shows what its prompt asked for."""
        probabilities, names = self.judge.probabilities(pictures, head), self.judge.heads[head]
        truth = np.array([names.index(prompt.shows[head]) for prompt in prompts])
        asked = probabilities[np.arange(len(truth)), truth].astype(np.float64)
        right = (probabilities.argmax(1) == truth).astype(np.float64)
        return Verdicts(right, asked, [prompt.prompt for prompt in prompts])

    def on_base(self, prompts: Sequence[EvalPrompt], head: str, what: str) -> Verdicts:
        """What the judge sees in the base's own pictures. Raises BlindJudge when that is too little to mean anything."""
        seen = self.verdicts((), prompts, head)
        rate = float(seen.right.mean())
        if rate < BLIND:
            raise BlindJudge(
                f"the judge {self.judge.name} finds {what} in only {rate:.0%} of the base's own {len(prompts)} pictures, "
                f"and below {BLIND:.0%} its verdicts mean nothing; name another judge with --judge"
            )
        return seen

    def compared(self, subject: str, base: Verdicts, after: Verdicts) -> list[Measurement]:
        """Accuracy on the base and under the patches."""
        return [
            base.accuracy(self.seed).measurement(subject, ON_BASE),
            after.accuracy(self.seed).measurement(subject, ACCURACY),
        ]

    def preserved(self, subject: str, base: Verdicts, after: Verdicts) -> list[Measurement]:
        """The same for what should not have changed, and the share of the base's accuracy that is left."""
        before, now = base.accuracy(self.seed), after.accuracy(self.seed)
        share = now.draws / np.maximum(before.draws, 1e-9)
        return [*self.compared(subject, base, after), measured(subject, SHARE, share, now.n)]

    def wrong_tensors(self, applied: Sequence[Term], subject: str) -> Measurement:
        """How many tensors of the live pipeline, once it carries `applied`, differ in a bit from a fresh composition."""
        self.image_generator.overlay.set(applied)
        names = changed_tensors(self.base, self.terms())
        wrong = differing_tensors(self.image_generator.pipe, self.base, applied, names)
        return Measurement(subject, WRONG, float(len(wrong)), len(names))


def changed_tensors(base: Base, terms: Iterable[Term]) -> list[str]:
    """Canonical names of all tensors that any of `terms` changes, sorted."""
    return sorted({name for term in terms for name in term.delta.targets(base)})


def differing_tensors(pipe: Any, base: Base, terms: Sequence[Term], names: Iterable[str]) -> list[str]:
    """Those of the tensors `names` in which a pipeline differs from `compose(base, terms)`, in its own dtype."""
    planned = plan(base, terms)
    changed = set(planned.names)
    different = []
    for name, parameter in Parameters(pipe, base).of(names).items():
        wanted = planned.tensor(name) if name in changed else base.tensor(name)
        carried = parameter.detach().cpu()
        if not identical(carried, wanted.to(carried.dtype)):
            different.append(name)
    return different
