"""The separable solver: many concepts at once on the embedded base, and on a text encoder of CLIP-L's size.

The large encoder has random weights: how long it takes does not depend on them, the rank of a patch does. Its vocabulary is
encoded in part (`--words`), and what all words of Stable Diffusion's tokenizer and 1,000 concepts would take is extrapolated
from the time of a prompt and of a solve: of so large a vocabulary, each word stands in one sentence.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.tables import arguments, save, show
from overpaint.bases.base import Base
from overpaint.bases.loading import resolve_device
from overpaint.bases.text_encoder import TextEncoder
from overpaint.core.concepts import Concept
from overpaint.evaluation.prompts import catalogue
from overpaint.patches.patch import make_patch
from overpaint.solvers.closed_form.separable import Separable
from overpaint.solvers.problem import EditProblem, settings_of
from overpaint.solvers.sentences import sentence_pairs
from overpaint.solvers.universe import PreservedPrompts, prepare
from overpaint.solvers.vocabulary import SENTENCES_PER_WORD
from overpaint.testing.contract import tiny_pipeline

WORDS_OF_CLIP = 30_000
"""Whole words of letters in the vocabulary of Stable Diffusion's tokenizer, about."""
MANY = 1_000

Row = list[Any]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--concepts", type=int, default=50, help="objects that are erased on the embedded base")
    parser.add_argument(
        "--large", type=int, default=8, help="concepts that are erased on the large encoder; 0: leave it out"
    )
    parser.add_argument("--words", type=int, default=16, help="words of the vocabulary that the large encoder encodes")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    asked = parser.parse_args()
    device = resolve_device(asked.device)
    concepts = [Concept(name) for name in catalogue().objects[: asked.concepts]]
    columns = [
        "base",
        "concepts",
        "vocabulary, s",
        "encoding, s",
        "universe, s",
        "solving, s",
        "s per concept",
        "bytes",
    ]
    rows = [["embedded", *measured(Base.open("emoji"), concepts, Separable(), device)]]
    if asked.large:
        with tempfile.TemporaryDirectory() as folder:
            base = clip_l(Path(folder) / "base")
            method = Separable(vocabulary=asked.words)
            rows.append(["CLIP-L, random", *measured(base, concepts[: asked.large], method, device)])
            rows.append(extrapolated(rows[-1], base, asked.words))
    save(asked.json, show(f"Separable on {device}, {torch.get_num_threads()} threads", columns, rows))


def measured(base: Base, concepts: list[Concept], method: Separable, device: torch.device) -> Row:
    """Seconds for what is done once and for each of the concepts, and the largest patch in bytes."""
    TextEncoder.of(base, device).hidden(["warm"])
    preserved = PreservedPrompts(words=method.vocabulary)
    vocabulary = timed(lambda: prepare(base, (), device, preserved=preserved))
    encoding = timed(lambda: prepare(base, concepts, device, preserved=preserved))
    problems = [EditProblem(base, concept, tuple(concepts), device=device) for concept in concepts]
    first = timed(lambda: method.solve(problems[0]))
    started, patches = time.perf_counter(), []
    for problem in problems:
        solution = method.solve(problem)
        solver = {"name": "separable", "settings": settings_of(method), "seed": 0}
        patches.append(make_patch(base, problem.concept, solution.delta, solver).nbytes)
    solving = time.perf_counter() - started
    each = (encoding + first + solving) / len(concepts)
    return [len(concepts), vocabulary, encoding, first, solving, each, max(patches)]


def extrapolated(row: Row, base: Base, words: int) -> Row:
    """The same for a whole vocabulary and `MANY` concepts: all but the universe's factorisation grows in proportion."""
    _, count, vocabulary, encoding, universe, solving, _, nbytes = row
    of_many = MANY / count
    total = encoding * of_many + universe * of_many + solving * of_many
    prompts = len(sentence_pairs(base, "object"))
    label = f"extrapolated: {WORDS_OF_CLIP} words, {prompts} prompts a concept"
    vocabulary *= WORDS_OF_CLIP / (words * SENTENCES_PER_WORD)
    return [label, MANY, vocabulary, encoding * of_many, universe * of_many, solving * of_many, total / MANY, nbytes]


def clip_l(folder: Path) -> Base:
    """A tiny U-Net that reads a random text encoder of CLIP-L's size: 768 wide, 77 tokens, 12 layers."""
    pipe = tiny_pipeline(width=768, length=77)
    small = pipe.text_encoder.config.to_dict()
    large = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    pipe.text_encoder = CLIPTextModel(CLIPTextConfig(**{**small, **large}))
    pipe.save_pretrained(folder)
    return Base.open(folder)


def timed(call: Any) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
