"""The independent judge: a small convolutional classifier with one head each for object, style and background.

It is trained on the drawings alone and never sees a generated picture.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor, nn

from overpaint.core.atomic import write_over

HEADS = ("object", "style", "background")


class JudgeNetwork(nn.Module):
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
        activations: Tensor = self.body(pictures)
        return activations.flatten(1)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.features(pictures)
        return {name: head(features) for name, head in self.heads.items()}

    def save(self, folder: Path) -> None:
        """Write `judge.safetensors` and `judge.json`."""
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        write_over(folder / "judge.safetensors", save(state))
        write_over(folder / "judge.json", json.dumps(self.classes, indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> JudgeNetwork:
        """Read what `save` wrote; raises FileNotFoundError when the folder has no judge."""
        classes = {k: tuple(v) for k, v in json.loads((folder / "judge.json").read_text("utf-8")).items()}
        judge = cls(classes)
        state = {
            k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / "judge.safetensors").items()
        }
        judge.load_state_dict(state)
        return judge.eval()
