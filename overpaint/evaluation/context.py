"""What a suite works with: patches on a base, questions about them, a studio that draws and a judge that looks.

Suites ask, draw and judge through a `Bench`, so that all of them choose the same questions, refuse the same blind judges and
know the same doubt.
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
from overpaint.evaluation.metrics import Mean, Measurement, found, mean
from overpaint.evaluation.prompts import OBJECT, EvalPrompt, PromptSet
from overpaint.patches.compose import Term, plan
from overpaint.patches.delta import identical
from overpaint.patches.live import Parameters
from overpaint.patches.patch import Patch

# Whether a pipeline carries exactly the weights that it should: no tolerance, one bit is too many.


def touched(base: Base, terms: Iterable[Term]) -> list[str]:
    """Canonical names of all tensors that any of `terms` changes, sorted."""
    return sorted({name for term in terms for name in term.delta.targets(base)})


def unequal(pipe: Any, base: Base, terms: Sequence[Term], names: Iterable[str]) -> list[str]:
    """Those of the tensors `names` in which a pipeline differs from `compose(base, terms)`, in its own dtype."""
    parameters, planned = Parameters(pipe, base), plan(base, terms)
    changed = set(planned.names)
    found = []
    for name, parameter in parameters.of(names).items():
        wanted = planned.tensor(name) if name in changed else base.tensor(name)
        carried = parameter.detach().cpu()
        if not identical(carried, wanted.to(carried.dtype)):
            found.append(name)
    return found


BLIND = 0.4
"""A class that a judge finds in less of the base's own pictures is not scored; SRS-ME left out a class by this rule."""
ON_BASE, ACCURACY, SHARE = "accuracy on the base", "accuracy", "share of the base's accuracy"
DISTANCE = "distance in the judge's features"
"""What the Frechet distance is called here: it is not FID, whose features are Inception's."""
CHANGE = "change of the pictures"
"""The root mean square difference to the base's pictures for the same seeds, in grey levels; 0 is no change at all."""
WRONG = "tensors that differ in any bit"
_SPARE = 4
"""Times as many questions as are wanted, so that enough are left without those that name something else."""


class BlindJudge(OverpaintError):
    """A judge that does not see in the base's own pictures what they show, so that its verdicts say nothing."""


@dataclass(frozen=True, eq=False)
class EvaluatedPatch:
    """A patch under judgement: at which strength it lies, what it cost, and how many bytes it has."""

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
    def told(self) -> frozenset[str]:
        """The words of every concept that the patch's solver knew of: its own, and those it preserved."""
        universe = self.patch.manifest["solver"].get("universe", [])
        known = [self.concept, *(Concept.from_json(each) for each in universe)]
        return frozenset(word.casefold() for concept in known for word in (*concept.words, concept.anchor) if word)


@dataclass(frozen=True, eq=False)
class Verdicts:
    """What a judge saw in pictures: whether each shows what it should, how sure it was of that, and for which prompt."""

    right: NDArray[np.float64]
    certain: NDArray[np.float64]
    prompts: list[str]

    def accuracy(self, seed: int = 0) -> Mean:
        return mean(self.right, self.prompts, seed)

    def certainty(self, seed: int = 0) -> Mean:
        """The mean probability of the class that should be there: finer than accuracy, which counts in steps."""
        return mean(self.certain, self.prompts, seed)

    def only(self, chosen: Sequence[int]) -> Verdicts:
        """The verdicts on some of the pictures, by their places."""
        return Verdicts(self.right[chosen], self.certain[chosen], [self.prompts[i] for i in chosen])

    def __add__(self, other: Verdicts) -> Verdicts:
        right, certain = (np.concatenate(pair) for pair in ((self.right, other.right), (self.certain, other.certain)))
        return Verdicts(right, certain, [*self.prompts, *other.prompts])


@dataclass(frozen=True, eq=False)
class EvalContext:
    """One evaluation's surroundings. `own` are questions of one's own, by head and class, instead of the world's."""

    base: Base
    prompt_set: PromptSet
    judge: Judge
    image_generator: ImageGenerator
    held: tuple[EvaluatedPatch, ...]
    known: tuple[Concept, ...] = ()
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    own: Mapping[tuple[str, str], list[EvalPrompt]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.held:
            raise OverpaintError("there is no patch to evaluate; add one to the recipe first")
        for concept in (each.concept for each in self.held):
            self.class_of(concept)

    # What is asked

    def class_of(self, concept: Concept) -> tuple[str, str]:
        """The head and class that a concept is judged by. Raises NotFound when world or judge do not know it."""
        head, name = self.prompt_set.class_of(concept)
        if name not in self.judge.heads.get(head, ()):
            known = ", ".join(self.judge.heads.get(head, ())) or "nothing"
            raise NotFound(f"the judge {self.judge.name} cannot tell the {head} {name!r} (it knows {known})")
        return head, name

    def erased(self, held: Iterable[EvaluatedPatch] | None = None) -> dict[tuple[str, str], Concept]:
        """The concepts under judgement, by head and class."""
        return {self.class_of(each.concept): each.concept for each in (self.held if held is None else held)}

    def others(self, head: str) -> list[str]:
        """The classes of a head that no patch here erases, and that the judge knows."""
        erased = self.erased()
        known = self.judge.heads.get(head, ())
        return [name for name in self.prompt_set.names(head) if (head, name) not in erased and name in known]

    def ask(self, head: str, name: str, count: int) -> list[EvalPrompt]:
        """Questions about one class."""
        if self.own:
            return self.own.get((head, name), [])
        return self.prompt_set.ask(head, name, count, self.seed)

    def neutral(self, head: str, name: str, count: int) -> list[EvalPrompt]:
        """Questions about one class, without those whose sentence names what is erased."""
        return [question for question in self.ask(head, name, count) if not self.names_erased(question)]

    def alone(self, head: str, name: str, count: int) -> list[EvalPrompt]:
        """Questions about one class that name nothing else which is erased: its patch alone decides about their pictures."""
        asked = self.ask(head, name, _SPARE * count)
        clear = [each for each in asked if not self.names_erased(each, (head, name))]
        return (clear or asked)[:count]

    def ask_others(self, head: str, count: int) -> list[EvalPrompt]:
        """Neutral questions about every other class of a head."""
        return [question for name in self.others(head) for question in self.neutral(head, name, count)]

    def names_erased(self, question: EvalPrompt, but: tuple[str, str] | None = None) -> bool:
        """Whether a sentence has a word of an erased concept, other than those of the class `but`."""
        words = set(re.findall(r"\w+", question.prompt.casefold()))
        return any(set(re.findall(r"\w+", word.casefold())) <= words for word in self._erased_words(but))

    def _erased_words(self, but: tuple[str, str] | None) -> set[str]:
        erased = [(key, each.concept) for each in self.held if (key := self.class_of(each.concept)) != but]
        known = ((*self.prompt_set.classes[head][name], name, *concept.words) for (head, name), concept in erased)
        return {word for words in known for word in words}

    # What is seen

    def terms(self, held: Iterable[EvaluatedPatch] | None = None) -> list[Term]:
        """The terms of some of the patches, or of all of them."""
        return [each.term for each in (self.held if held is None else held)]

    def verdicts(self, terms: Sequence[Term], questions: Sequence[EvalPrompt], head: str = OBJECT) -> Verdicts:
        """What the judge sees in the pictures of `questions` under `terms`. Raises OverpaintError without a question."""
        if not questions:
            raise OverpaintError(
                f"there is no question about any {head} here; ask with --prompts, or for more pictures"
            )
        likely = self.judge.probabilities(self.image_generator.draw(terms, questions), head)
        names = self.judge.heads[head]
        truth = np.array([names.index(question.shows[head]) for question in questions])
        certain = likely[np.arange(len(truth)), truth].astype(np.float64)
        return Verdicts((likely.argmax(1) == truth).astype(np.float64), certain, [q.prompt for q in questions])

    def on_base(self, questions: Sequence[EvalPrompt], head: str, what: str) -> Verdicts:
        """What the judge sees in the base's own pictures. Raises BlindJudge when that is too little to mean anything."""
        seen = self.verdicts((), questions, head)
        rate = float(seen.right.mean())
        if rate < BLIND:
            raise BlindJudge(
                f"the judge {self.judge.name} finds {what} in only {rate:.0%} of the base's own {len(questions)} pictures, "
                f"and below {BLIND:.0%} its verdicts mean nothing; name another judge with --judge"
            )
        return seen

    def compared(self, subject: str, base: Verdicts, after: Verdicts) -> list[Measurement]:
        """Accuracy on the base and under the patches."""
        return [
            base.accuracy(self.seed).found(subject, ON_BASE),
            after.accuracy(self.seed).found(subject, ACCURACY),
        ]

    def kept(self, subject: str, base: Verdicts, after: Verdicts) -> list[Measurement]:
        """The same for what should have stayed, and the share of the base's accuracy that did."""
        before, now = base.accuracy(self.seed), after.accuracy(self.seed)
        share = now.draws / np.maximum(before.draws, 1e-9)
        return [*self.compared(subject, base, after), found(subject, SHARE, share, now.n)]


def joined(parts: Sequence[Verdicts]) -> Verdicts:
    """Several verdicts as one."""
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    return whole
