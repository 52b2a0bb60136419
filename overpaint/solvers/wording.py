"""The prompts on which solvers train: those that name a concept, and those that others should go on understanding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from overpaint.bases.text import TextEncoder
from overpaint.concepts import HOLE
from overpaint.solvers.keys import neutral_sentences, sentences
from overpaint.solvers.problem import EditProblem

Item = TypeVar("Item")


def asked(problem: EditProblem, encoder: TextEncoder, count: int) -> list[tuple[str, str]]:
    """Prompts that name the concept, each with the same prompt without it: with its anchor, or with it left out.

    The concept's own prompts and, with `count` 0, its bare words, as most papers have it; else that many sentences, spread
    evenly over all sentences and words. Raises PromptTooLong when the text encoder would not read a word to its end.
    """
    concept = problem.concept
    pairs = sentences(problem.base, concept.kind).pairs if count else ((HOLE, ""),)
    plain = [(template, word, without) for template, without in pairs for word in concept.words]
    own = [(template, word, " ".join(template.format("").split())) for template, word in concept.spoken]
    for template, word, _ in (*own, *plain):
        encoder.first_position(template, word)
    return [
        (template.format(word), template.format(concept.anchor) if concept.anchor else without)
        for template, word, without in (*own, *(spread(plain, count) if count else plain))
    ]


def retained(problem: EditProblem, encoder: TextEncoder, count: int) -> list[str]:
    """The empty prompt, the prompts that the problem keeps, and `count` more in which the concept does not occur.

    Half of these name the other concepts of the universe, as far as there are any; the rest, words of the tokenizer's
    vocabulary in neutral sentences.
    """
    named = [
        template.format(word)
        for other in problem.others
        for word in other.words
        for template, _ in sentences(problem.base, other.kind).pairs
    ]
    plain = [template.format(word) for word in encoder.words() for template in neutral_sentences(problem.base)]
    own = re.compile("|".join(rf"\b{re.escape(word)}\b" for word in problem.concept.words), re.IGNORECASE)
    listed = spread([prompt for prompt in named if not own.search(prompt)], count // 2)
    return [
        "",
        *problem.keep,
        *listed,
        *spread([prompt for prompt in plain if not own.search(prompt)], count - len(listed)),
    ]


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items at equal distances; all, where there are fewer."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
