"""What a base hears of a concept, as a thin factor F of its keys' second moment: `K K^T = F F^T`.

Encoding a concept's sentences takes seconds on a large text encoder, the factor is a few hundred kilobytes; so it is
kept beside the registry and read again while base and sentences are the same.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from overpaint.bases.base import Base
from overpaint.bases.digests import canonical_json
from overpaint.bases.text import TextEncoder, encoders
from overpaint.concepts import Concept
from overpaint.solvers.keys import PADDING, keys_of, sentences

ENERGY = 1 - 1e-6
"""Share of the second moment's trace that the factor keeps."""


class Moments:
    """Second-moment factors of concepts on one base. `cache` is a folder, or None to keep nothing.

    Sentences that name another of `concepts` are left out: what erasing ink does to "a cat in ink style" says nothing
    about cats.
    """

    def __init__(self, base: Base, concepts: Iterable[Concept], cache: Path | None, device: torch.device) -> None:
        self._base, self._cache, self._device = base, cache, device
        self._named = {word.casefold() for concept in concepts for word in concept.words}
        self._encoders: dict[str, TextEncoder] = {}
        self._factors: dict[str, Tensor] = {}

    def factor(self, concept: Concept, doors: tuple[str, ...] = ("text_encoder",)) -> Tensor:
        """F, float64 [d, k], of what comes through doors that stand side by side, one below the other.

        Raises PromptTooLong when the concept does not fit into a sentence.
        """
        name = self._name(concept, doors)
        if name not in self._factors:
            found = self._recall(name)
            if found is None:
                found = self._compute(concept, doors)
                self._keep(name, found)
            self._factors[name] = found
        return self._factors[name].double()

    def _name(self, concept: Concept, doors: tuple[str, ...]) -> str:
        meant = {
            "base": self._base.fingerprint,
            "doors": doors,
            "words": concept.words,
            "sentences": self._templates(concept),
            "padding": PADDING,
        }
        return hashlib.sha256(canonical_json(meant)).hexdigest()

    def _templates(self, concept: Concept) -> list[str]:
        asked = [template for template, _ in sentences(self._base, concept.kind).pairs]
        return [t for t in asked if not self._named & set(re.findall(r"\w+", t.casefold()))] or asked[:1]

    def _compute(self, concept: Concept, doors: tuple[str, ...]) -> Tensor:
        self._encoders = self._encoders or encoders(self._base, self._device)
        templates = self._templates(concept)
        count = len(concept.words) * len(templates)
        keys = torch.cat([keys_of(self._encoders[door], concept.words, templates).cpu() for door in doors])
        left, size, _ = torch.linalg.svd(keys / count**0.5, full_matrices=False)
        share = size.square().cumsum(0) / size.square().sum()
        rank = int((share < ENERGY).sum()) + 1
        factor: Tensor = (left[:, :rank] * size[:rank]).float()
        return factor

    def _recall(self, name: str) -> Tensor | None:
        if self._cache is None or not (file := self._cache / f"{name}.safetensors").is_file():
            return None
        try:
            found: Tensor = safetensors.torch.load_file(file)["factor"]
        except (SafetensorError, KeyError, OSError):
            return None  # only time is lost: it is computed again
        return found

    def _keep(self, name: str, factor: Tensor) -> None:
        if self._cache is None:
            return
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            scratch = self._cache / f"{name}.{os.getpid()}"
            safetensors.torch.save_file({"factor": factor.contiguous()}, scratch)
            scratch.replace(self._cache / f"{name}.safetensors")
        except OSError:
            pass  # a read-only registry can still be asked
