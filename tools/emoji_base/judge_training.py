"""Train the judge on augmented drawings and on pictures that show none of the objects; publish what it confuses.

Half of the drawings have been through the autoencoder, because every generated picture has; blur and noise are added
to the others. Where there is nothing to name, style and background are not asked.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tools.emoji_base import autoencoder, nothing
from tools.emoji_base.catalogue import Scene, catalogue
from tools.emoji_base.judge import HEADS, NONE, Judge
from tools.emoji_base.loop import Place, Schedule, train
from tools.emoji_base.pictures import HELD_OUT_SEED, TRAINING_SEED, as_bytes, as_input, kept, pool

NOTHING_SHARE = 0.25
"""Of a batch."""


def run(place: Place, schedule: Schedule) -> None:
    """Train, save to `out/judge`, measure on held-out pictures, write `out/judge/confusion.json`."""
    torch.manual_seed(place.seed)
    words = catalogue()
    judge = Judge({"object": (*words.objects, NONE), "style": words.styles, "background": words.backgrounds})
    judge.to(place.device)
    drawn, scenes = pool(place, 2)
    back = kept(place.work / "decoded-drawings.npy", lambda: _decoded(place, drawn).numpy())
    truth = labels(judge, scenes)
    empty = torch.cat(list(nothing.pool(place, drawn, scenes, 1200, TRAINING_SEED, held_out=False).values()))
    none = judge.classes["object"].index(NONE)
    count = round(schedule.batch * NOTHING_SHARE)

    def loss_of(generator: torch.Generator, step: int) -> Tensor:
        chosen = torch.randint(len(drawn), (schedule.batch - count,), generator=generator)
        source = torch.rand(len(chosen), 1, 1, 1, generator=generator) < 0.5
        pictures = torch.where(source, drawn[chosen], back[chosen])
        others = empty[torch.randint(len(empty), (count,), generator=generator)]
        x = _weathered(as_input(torch.cat([pictures, others])), generator).to(place.device)
        found = judge(x)
        losses = []
        for head in HEADS:
            target = truth[head][chosen]
            target = torch.cat([target, target.new_full((count,), none if head == "object" else -1)])
            losses.append(
                nn.functional.cross_entropy(found[head], target.to(place.device), label_smoothing=0.05, ignore_index=-1)
            )
        return torch.stack(losses).sum()

    train("judge", judge, loss_of, place, schedule)
    judge.save(place.out / "judge")
    report = measure(Judge.load(place.out / "judge"), place)
    (place.out / "judge" / "confusion.json").write_text(json.dumps(report, indent=1), "utf-8")
    print(json.dumps({k: v for k, v in report.items() if k != "confused"}, indent=1), flush=True)


def labels(judge: Judge, scenes: list[Scene]) -> dict[str, Tensor]:
    """Class indices of each head, int64 [n]."""
    return {h: torch.tensor([judge.classes[h].index(getattr(s, h)) for s in scenes]) for h in HEADS}


def measure(judge: Judge, place: Place) -> dict[str, Any]:
    """Accuracy on held-out drawings, raw and decoded, what is taken for what, and what it says of empty pictures."""
    drawn, scenes = pool(place, 1, HELD_OUT_SEED)
    sets = {
        "drawings": drawn,
        "decoded": kept(place.work / "decoded-held-out.npy", lambda: _decoded(place, drawn).numpy()),
    }
    report: dict[str, Any] = {"n": len(scenes), "right": {}, "nothing": {}, "confused": {}}
    for kind, pictures in sets.items():
        named = judge.names(as_input(pictures))
        report["right"][kind] = {
            head: sum(getattr(s, head) == n for s, n in zip(scenes, named[head], strict=True)) / len(scenes)
            for head in HEADS
        }
        wrong = Counter((str(s.object), n) for s, n in zip(scenes, named["object"], strict=True) if s.object != n)
        report["confused"][kind] = [
            {"shown": shown, "named": name, "times": times} for (shown, name), times in wrong.most_common()
        ]
    for kind, pictures in nothing.pool(place, drawn, scenes, 300, HELD_OUT_SEED, held_out=True).items():
        said = judge.names(as_input(pictures))["object"]
        report["nothing"][kind] = {"n": len(said), "none of these": sum(name == NONE for name in said) / len(said)}
        report["confused"][kind] = [
            {"shown": kind, "named": name, "times": times}
            for name, times in Counter(said).most_common()
            if name != NONE
        ]
    report["calibration"] = calibration(judge, drawn, scenes)
    return report


@torch.no_grad()
def calibration(judge: Judge, pictures: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Mean confidence beside accuracy of the object head, and their expected difference over ten equal bins."""
    logits = torch.cat([judge(as_input(part))["object"] for part in pictures.split(256)])
    sure, named = logits.softmax(1).max(1)
    right = (named == labels(judge, scenes)["object"]).float()
    bins = (sure * 10).long().clamp(max=9)
    gap = sum(
        float((bins == b).float().mean() * (sure[bins == b].mean() - right[bins == b].mean()).abs())
        for b in range(10)
        if bool((bins == b).any())
    )
    return {"confidence": float(sure.mean()), "accuracy": float(right.mean()), "expected calibration error": gap}


def _decoded(place: Place, pictures: Tensor) -> Tensor:
    vae = autoencoder.load(place)
    return as_bytes(autoencoder.decoded(vae, autoencoder.encoded(vae, pictures)))


def _weathered(x: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the batch a little blurred, all of it a little noisy."""
    blurred = nn.functional.avg_pool2d(nn.functional.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(len(x), 1, 1, 1, generator=generator).mul(2).sub(1).clamp(min=0)
    noise = torch.randn(x.shape, generator=generator) * 0.08 * torch.rand(len(x), 1, 1, 1, generator=generator)
    return x.lerp(blurred, share) + noise


def confusion_of(folder: Path) -> dict[str, Any]:
    """What `run` published."""
    found: dict[str, Any] = json.loads((folder / "judge" / "confusion.json").read_text("utf-8"))
    return found
