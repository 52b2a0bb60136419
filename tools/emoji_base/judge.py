"""The independent judge while it is trained: the network that ships with a base, and what training and cards ask of it.

It is trained on the drawings and on pictures that show none of the objects, and never sees a generated picture. The
object head has one class more than there are objects: `NONE`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from overpaint.evaluation.judges import JudgeNetwork

HEADS = ("object", "style", "background")
NONE = "none of these"
"""The object head's last class: smears, mixtures, empty backgrounds, noise, drawings of other things."""


class Judge(JudgeNetwork):
    """The network, and the names that it gives."""

    @torch.no_grad()
    def names(self, pictures: Tensor) -> dict[str, list[str]]:
        """The most likely class of each picture, by head."""
        names: dict[str, list[str]] = {name: [] for name in self.classes}
        for part in pictures.split(256):
            for name, logits in self(part).items():
                names[name] += [self.classes[name][i] for i in logits.argmax(1).tolist()]
        return names
