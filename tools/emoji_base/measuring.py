"""Ask a base for pictures and let its judge say what they show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tools.emoji_base.catalogue import Catalogue, Scene, captions, catalogue
from tools.emoji_base.judge import HEADS, Judge

Draw: TypeAlias = Callable[[list[str], list[int]], Tensor]
"""Prompts and a seed for each to pictures [n, 3, 64, 64] in [-1, 1]."""


@dataclass(frozen=True)
class Asked:
    """A prompt, what it asks for, and its seed."""

    prompt: str
    scene: Scene
    seed: int


@dataclass(frozen=True)
class Verdict:
    """What the judge named in a picture, by head."""

    asked: Asked
    named: dict[str, str]

    def right(self, head: str) -> bool | None:
        """Whether the head names what was asked for; None where the prompt left it open."""
        wanted = getattr(self.asked.scene, head)
        return None if wanted is None else bool(self.named[head] == wanted)


@dataclass(frozen=True)
class Share:
    """A count of right ones out of `n`, with its 95% Wilson interval."""

    right: int
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end; (0, 1) of nothing."""
        if not self.n:
            return 0.0, 1.0
        z, p = 1.959964, self.right / self.n
        middle = (p + z * z / (2 * self.n)) / (1 + z * z / self.n)
        half = z * math.sqrt(p * (1 - p) / self.n + z * z / (4 * self.n * self.n)) / (1 + z * z / self.n)
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.right / max(1, self.n):.1%} ({low:.1%} to {high:.1%}, n={self.n})"


def questions(per_object: int, *, held_out: bool, words: Catalogue | None = None) -> list[Asked]:
    """`per_object` prompts for every object: a third name it alone, a third a style too, a third a background too.

    `words` is the part of the catalogue that is asked for. Styles, backgrounds and sentences take turns over the
    objects; every prompt has its own seed.
    """
    words = words or catalogue()
    found: list[Asked] = []
    turns = cycle(range(10_007))
    for name in words.objects:
        for k in range(per_object):
            turn = next(turns)
            style = words.styles[(turn // 3) % len(words.styles)] if k % 3 == 1 else None
            background = words.backgrounds[(turn // 3) % len(words.backgrounds)] if k % 3 == 2 else None
            scene = Scene(name, style, background)
            sentences = captions(scene, held_out=held_out)
            found.append(Asked(sentences[turn * 7 % len(sentences)], scene, 100_000 + len(found)))
    return found


def judged(draw: Draw, judge: Judge, asked: Sequence[Asked], batch: int) -> list[Verdict]:
    """Draw and judge every question, `batch` at a time."""
    found: list[Verdict] = []
    left = iter(asked)
    while part := list(islice(left, batch)):
        pictures = draw([a.prompt for a in part], [a.seed for a in part])
        named = judge.names(pictures)
        found += [Verdict(a, {head: named[head][i] for head in HEADS}) for i, a in enumerate(part)]
        print(f"judged {len(found)} of {len(asked)}: {share(found, 'object')}", flush=True)
    return found


def share(verdicts: Sequence[Verdict], head: str) -> Share:
    """How many are right, of those whose prompt names what the head judges."""
    known = [right for v in verdicts if (right := v.right(head)) is not None]
    return Share(sum(known), len(known))


def drawing(pipe: Any, latent: tuple[int, int, int], steps: int, guidance: float, length: int | None = None) -> Draw:
    """Draw with a diffusers pipeline; `latent` is a latent's shape, `length` the T5's tokens where there is one."""

    def draw(prompts: list[str], seeds: list[int]) -> Tensor:
        noise = torch.stack([torch.randn(latent, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "height": 64, "width": 64}
        if length is not None:
            settings["max_sequence_length"] = length
        images = pipe(prompts, latents=noise.to(pipe.device), output_type="pt", **settings).images
        found: Tensor = images.float().cpu() * 2 - 1
        return found

    return draw
