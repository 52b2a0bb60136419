"""Train the judge on augmented drawings: cross-entropy on object, style and background.

Blur and noise are added, because a generated picture passes through an autoencoder and a drawing does not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from overpaint.bases.emoji.catalogue import Scene, catalogue
from overpaint.bases.emoji.judge import HEADS, Judge
from overpaint.bases.emoji.training.loop import Run, train
from overpaint.bases.emoji.training.pictures import HELD_OUT_SEED, TRAINING_SEED, as_input, pool


def run(spec: Run) -> None:
    """Train, print the accuracy on held-out augmentations, save to `out/judge`."""
    torch.manual_seed(spec.seed)
    words = catalogue()
    judge = Judge({"object": words.objects, "style": words.styles, "background": words.backgrounds}).to(spec.device)
    pictures, scenes = pool(spec.data, 6, TRAINING_SEED)
    truth = labels(judge, scenes)

    def loss_of(generator: torch.Generator, step: int) -> Tensor:
        chosen = torch.randint(len(pictures), (spec.batch,), generator=generator)
        x = _weathered(as_input(pictures[chosen]), generator).to(spec.device)
        found = judge(x)
        losses = [
            nn.functional.cross_entropy(found[h], truth[h][chosen].to(spec.device), label_smoothing=0.05) for h in HEADS
        ]
        return torch.stack(losses).sum()

    train("judge", judge, loss_of, spec)
    held_out, shown = pool(spec.data, 1, HELD_OUT_SEED)
    truth = labels(judge, shown)
    with torch.no_grad():
        found = judge(as_input(held_out).to(spec.device))
    for head in HEADS:
        print(f"judge held-out {head} accuracy {(found[head].cpu().argmax(1) == truth[head]).float().mean():.4f}")
    judge.save(spec.out / "judge")


def labels(judge: Judge, scenes: list[Scene]) -> dict[str, Tensor]:
    """Class indices of each head, int64 [n]."""
    return {h: torch.tensor([judge.classes[h].index(getattr(s, h)) for s in scenes]) for h in HEADS}


def _weathered(x: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the batch a little blurred, all of it a little noisy."""
    blurred = nn.functional.avg_pool2d(nn.functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(len(x), 1, 1, 1, generator=generator).mul(2).sub(1).clamp(min=0)
    noise = torch.randn(x.shape, generator=generator) * 0.08 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return x.lerp(blurred, share) + noise
