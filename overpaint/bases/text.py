"""Prompts to embeddings: what the cross-attention of a base reads when a word is used in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from overpaint.bases.base import Base
from overpaint.bases.quiet import quiet_loading
from overpaint.errors import OverpaintError

BATCH = 128


class PromptTooLong(OverpaintError):
    """A concept whose tokens lie past the end of what the text encoder reads."""


@dataclass
class TextEncoder:
    """A base's tokenizer and text tower in float32, on one device."""

    tokenizer: CLIPTokenizer
    model: Any
    _tokens: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, base: Base, device: torch.device | str = "cpu") -> TextEncoder:
        """Load the text encoder of a base."""
        with quiet_loading():
            tokenizer = CLIPTokenizer.from_pretrained(base.path / "tokenizer", local_files_only=True)
            model: Any = CLIPTextModel.from_pretrained(
                base.path / "text_encoder", dtype=torch.float32, local_files_only=True
            )
        return cls(tokenizer, model.to(device).eval())

    @property
    def width(self) -> int:
        """Numbers in one token's embedding, d."""
        return int(self.model.config.hidden_size)

    @property
    def length(self) -> int:
        """Tokens in a padded prompt."""
        return int(min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings))

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text without begin, end and padding."""
        # A concept's sentences share their beginnings, and a call of the tokenizer costs most of a millisecond.
        if text not in self._tokens:
            self._tokens[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._tokens[text]

    @torch.no_grad()
    def hidden(self, prompts: Sequence[str]) -> Tensor:
        """The last hidden states, float32 [n, length, d], as the pipeline hands them to the U-Net.

        A prompt that occurs several times is encoded once.
        """
        unique = list(dict.fromkeys(prompts))
        parts = []
        for start in range(0, len(unique), BATCH):
            ids = self.tokenizer(
                unique[start : start + BATCH],
                padding="max_length",
                max_length=self.length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            parts.append(self.model(ids.to(self.model.device)).last_hidden_state)
        place = {prompt: i for i, prompt in enumerate(unique)}
        return torch.cat(parts)[[place[prompt] for prompt in prompts]]

    def first_position(self, template: str, word: str) -> int:
        """The position of a word's first token in a template (begin-of-text is position 0).

        Raises PromptTooLong when the word would be cut off.
        """
        position = 1 + len(self.tokens(template.partition("{}")[0].strip()))
        if position + len(self.tokens(word)) >= self.length:
            raise PromptTooLong(
                f"{word!r} in {template!r} ends past the {self.length} tokens this text encoder reads; use a shorter name"
            )
        return position

    def words(self) -> list[str]:
        """Every whole word of the tokenizer's vocabulary, sorted: the tokens of letters that end a word."""
        ending = (token.removesuffix("</w>") for token in self.tokenizer.get_vocab() if token.endswith("</w>"))
        return sorted(word for word in ending if len(word) > 1 and word.isalpha() and word.isascii())
