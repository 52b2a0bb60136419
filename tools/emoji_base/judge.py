"""The independent judge: a small convolutional classifier with one head each for object, style and background.

It is trained on the drawings and on pictures that show none of the objects, and never sees a generated picture. The
object head has one class more than there are objects: `NONE`.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HEADS = ("object", "style", "background")
NONE = "none of these"
"""The object head's last class: smears, mixtures, empty backgrounds, noise, drawings of other things."""


class Judge(nn.Module):
    """Pictures [n, 3, 64, 64] in [-1, 1] to logits by head; `classes` names each head's outputs in order."""

    def __init__(self, classes: dict[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.classes = classes
        channels = (3, 24, 48, 96, 144)
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(i, o, 4 if i == 3 else 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
                for i, o in pairwise(channels)
            )
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(channels[-1] * 4 * 4, len(found)) for name, found in classes.items()}
        )

    def features(self, pictures: Tensor) -> Tensor:
        """The last convolution's activations, [n, 2304]: the space in which distances are measured."""
        found: Tensor = self.body(pictures)
        return found.flatten(1)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        found = self.features(pictures)
        return {name: head(found) for name, head in self.heads.items()}

    @torch.no_grad()
    def names(self, pictures: Tensor) -> dict[str, list[str]]:
        """The most likely class of each picture, by head."""
        found: dict[str, list[str]] = {name: [] for name in self.classes}
        for part in pictures.split(256):
            for name, logits in self(part).items():
                found[name] += [self.classes[name][i] for i in logits.argmax(1).tolist()]
        return found

    def save(self, folder: Path) -> None:
        """Write `judge.safetensors` and `judge.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file(state, folder / "judge.safetensors")
        (folder / "judge.json").write_text(json.dumps(self.classes, indent=1), "utf-8")

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """Read what `save` wrote; raises FileNotFoundError when the folder has no judge."""
        classes = {k: tuple(v) for k, v in json.loads((folder / "judge.json").read_text("utf-8")).items()}
        judge = cls(classes)
        state = {
            k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / "judge.safetensors").items()
        }
        judge.load_state_dict(state)
        return judge.eval()
