"""Prompts to embeddings: what comes through a door of a base when a word is used in a sentence."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from overpaint.bases.base import Base
from overpaint.bases.layout import LAST, PENULTIMATE, POOLED, Door
from overpaint.bases.quiet import quiet_loading
from overpaint.bases.towers import layers_of, prompts_at_a_time, tower
from overpaint.errors import OverpaintError

REMEMBERED = 64 << 20
"""Bytes of embeddings that are kept for all text encoders of a base: 128 prompts of Stable Diffusion XL's larger one."""


class PromptTooLong(OverpaintError):
    """A concept whose tokens lie past the end of what the text encoder reads."""


class _Answers:
    """The newest answers of some text encoders, by encoder and prompts: as many as fit into `REMEMBERED`."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, ...], dict[str, Tensor]] = OrderedDict()
        self._size = 0

    def recall(self, asked: tuple[str, ...]) -> dict[str, Tensor] | None:
        if asked in self._kept:
            self._kept.move_to_end(asked)
        return self._kept.get(asked)

    def keep(self, asked: tuple[str, ...], found: dict[str, Tensor]) -> None:
        size = _nbytes(found)
        if size > REMEMBERED:
            return
        self.make_room(size)
        self._kept[asked] = found
        self._size += size

    def make_room(self, size: int) -> None:
        """Forget the oldest until so many bytes fit: before they are computed, or both would be in memory."""
        while self._kept and self._size + size > REMEMBERED:
            self._size -= _nbytes(self._kept.popitem(last=False)[1])


def _nbytes(answer: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in answer.values())


@dataclass
class _Memory:
    """What the doors of one text encoder share: its name, what each lets through, token ids by text, the newest answers."""

    encoder: str
    says: frozenset[str]
    answers: _Answers
    tokens: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class TextEncoder:
    """A base's tokenizer and text tower in float32, on one device, heard through one door.

    `says` is what the door lets through: the last hidden states, those before the last layer, or the pooled embedding.
    """

    tokenizer: CLIPTokenizer
    model: Any
    says: str
    _memory: _Memory = field(repr=False)

    @classmethod
    def of(cls, base: Base, device: torch.device | str = "cpu", door: str = "text_encoder") -> TextEncoder:
        """Load the text encoder behind a door of a base. Raises NotFound for a door the base lacks."""
        return encoders(base, device, (door,))[door]

    @property
    def is_pooled(self) -> bool:
        """Whether a prompt is one embedding rather than one per token."""
        return self.says == POOLED

    @property
    def width(self) -> int:
        """Numbers in one embedding, d."""
        return int(self.model.config.projection_dim if self.is_pooled else self.model.config.hidden_size)

    @property
    def length(self) -> int:
        """Tokens in a padded prompt."""
        return int(min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings))

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text without begin, end and padding."""
        # A concept's sentences share their beginnings, and a call of the tokenizer costs most of a millisecond.
        if text not in self._memory.tokens:
            self._memory.tokens[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._memory.tokens[text]

    def hidden(self, prompts: Sequence[str]) -> Tensor:
        """What the U-Net is handed, as the pipeline hands it: float32 [n, length, d]; [n, 1, d] where it is pooled.

        A prompt that occurs several times is encoded once.
        """
        unique = list(dict.fromkeys(prompts))
        found = self._answers(unique)[self.says]
        if len(unique) == len(prompts):
            return found
        place = {prompt: i for i, prompt in enumerate(unique)}
        return found[[place[prompt] for prompt in prompts]]

    @torch.no_grad()
    def _answers(self, prompts: list[str]) -> dict[str, Tensor]:
        """What every door of this encoder lets through.

        The newest answers are kept: doors are asked in turn, and concepts are sent to the same sentences without them.
        """
        answers, asked = self._memory.answers, (self._memory.encoder, *prompts)
        recalled = answers.recall(asked)
        if recalled is not None:
            return recalled
        batch = prompts_at_a_time(self.model)
        found: dict[str, Tensor] = {}
        for start in range(0, len(prompts), batch):
            for says, part in self._forward(prompts[start : start + batch]).items():
                if says not in found:
                    found[says] = part.new_empty((len(prompts), *part.shape[1:]))
                    answers.make_room(_nbytes(found))
                found[says][start : start + batch] = part
        answers.keep(asked, found)
        return found

    def _forward(self, prompts: list[str]) -> dict[str, Tensor]:
        ids = self.tokenizer(
            prompts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).input_ids
        wanted, before = self._memory.says, []
        # Asked for hidden states, the model would keep those of every layer.
        last = layers_of(self.model)[-1]
        hook = last.register_forward_pre_hook(lambda module, args: before.append(args[0]))
        try:
            found = self.model(ids.to(self.model.device))
        finally:
            hook.remove()
        answers = {}
        if LAST in wanted:
            answers[LAST] = found.last_hidden_state
        if PENULTIMATE in wanted:
            answers[PENULTIMATE] = before[0]
        if POOLED in wanted:
            answers[POOLED] = found.text_embeds[:, None]
        return answers

    def first_position(self, template: str, word: str) -> int:
        """The row of `hidden` from which a word in a template is heard: its first token's (begin-of-text is 0).

        Where the embedding is pooled there is one row, 0. Raises PromptTooLong when the word would be cut off.
        """
        position = 1 + len(self.tokens(template.partition("{}")[0].strip()))
        if position + len(self.tokens(word)) >= self.length:
            raise PromptTooLong(
                f"{word!r} in {template!r} ends past the {self.length} tokens this text encoder reads; use a shorter name"
            )
        return 0 if self.is_pooled else position

    def words(self) -> list[str]:
        """Every whole word of the tokenizer's vocabulary, sorted: the tokens of letters that end a word."""
        ending = (token.removesuffix("</w>") for token in self.tokenizer.get_vocab() if token.endswith("</w>"))
        return sorted(word for word in ending if len(word) > 1 and word.isalpha() and word.isascii())


def encoders(
    base: Base, device: torch.device | str = "cpu", doors: Sequence[str] | None = None
) -> dict[str, TextEncoder]:
    """A text encoder for each door of a base (or each of `doors`), in order; doors of one model share it.

    Asked for the same prompts one after the other, doors that share a model compute once. Raises NotFound for a door the
    base lacks.
    """
    chosen = {name: base.door(name) for name in (base.doors if doors is None else doors)}
    found: dict[str, TextEncoder] = {}
    answers = _Answers()
    for name, door in chosen.items():
        same = [other for other, spec in chosen.items() if spec.encoder == door.encoder]
        if same[0] in found:
            first = found[same[0]]
            found[name] = TextEncoder(first.tokenizer, first.model, door.says, first._memory)
        else:
            memory = _Memory(door.encoder, frozenset(chosen[other].says for other in same), answers)
            found[name] = TextEncoder(_tokenizer(base, door), tower(base, door.encoder, device), door.says, memory)
    return found


def _tokenizer(base: Base, door: Door) -> CLIPTokenizer:
    with quiet_loading():
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(
            base.config_folder / door.tokenizer, local_files_only=True
        )
    return tokenizer
