"""Prompts to embeddings: what comes through a door of a base when a word is used in a sentence."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from overpaint.bases.base import Base, BrokenBase
from overpaint.bases.layout import LAST, PENULTIMATE, POOLED, Door
from overpaint.bases.quiet import quiet_loading
from overpaint.errors import OverpaintError

BATCH = 128
"""Prompts at a time for a text encoder of SD 1.x's size; fewer for larger ones, so that they need no more memory."""

REMEMBERED = 4
"""Batches of prompts whose embeddings are kept."""

_MODELS: dict[str, Any] = {
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
}


class PromptTooLong(OverpaintError):
    """A concept whose tokens lie past the end of what the text encoder reads."""


@dataclass
class _Memory:
    """What the doors of one text encoder share: what each lets through, token ids by text, and the newest answers."""

    says: frozenset[str]
    tokens: dict[str, list[int]] = field(default_factory=dict)
    answers: OrderedDict[tuple[str, ...], dict[str, Tensor]] = field(default_factory=OrderedDict)


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
        place = {prompt: i for i, prompt in enumerate(unique)}
        return self._answers(unique)[self.says][[place[prompt] for prompt in prompts]]

    @torch.no_grad()
    def _answers(self, prompts: list[str]) -> dict[str, Tensor]:
        """What every door of this encoder lets through.

        The newest answers are kept: doors are asked in turn, and concepts are sent to the same sentences without them.
        """
        answers, asked = self._memory.answers, tuple(prompts)
        if asked in answers:
            answers.move_to_end(asked)
            return answers[asked]
        config = self.model.config
        batch = max(1, min(BATCH, BATCH * 768 * 12 // (config.hidden_size * config.num_hidden_layers)))
        parts = [self._forward(prompts[start : start + batch]) for start in range(0, len(prompts), batch)]
        found = {says: torch.cat([part[says] for part in parts]) for says in parts[0]}
        if len(prompts) <= BATCH:
            answers[asked] = found
            while len(answers) > REMEMBERED:
                answers.popitem(last=False)
        return found

    def _forward(self, prompts: list[str]) -> dict[str, Tensor]:
        ids = self.tokenizer(
            prompts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).input_ids
        wanted = self._memory.says
        found = self.model(ids.to(self.model.device), output_hidden_states=PENULTIMATE in wanted)
        answers = {}
        if LAST in wanted:
            answers[LAST] = found.last_hidden_state
        if PENULTIMATE in wanted:
            answers[PENULTIMATE] = found.hidden_states[-2]
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
    for name, door in chosen.items():
        same = [other for other, spec in chosen.items() if spec.encoder == door.encoder]
        if same[0] in found:
            first = found[same[0]]
            found[name] = TextEncoder(first.tokenizer, first.model, door.says, first._memory)
        else:
            memory = _Memory(frozenset(chosen[other].says for other in same))
            found[name] = TextEncoder(*_loaded(base, door, device), door.says, memory)
    return found


def _loaded(base: Base, door: Door, device: torch.device | str) -> tuple[CLIPTokenizer, Any]:
    """The tokenizer and the model behind a door, with the weights that the base has, whatever files they lie in."""
    rules, folder = base.layout.components[door.encoder], base.config_folder
    kind = _MODELS[rules.model]
    with quiet_loading():
        tokenizer = CLIPTokenizer.from_pretrained(folder / door.tokenizer, local_files_only=True)
        config = CLIPTextConfig.from_pretrained(folder / door.encoder, local_files_only=True)
        with torch.device("meta"):
            names = {key: f"{door.encoder}/{rules.canonical(key)}" for key in kind(config).state_dict()}
        if lacking := sorted(set(names.values()) - base.places.keys()):
            raise BrokenBase(
                f"the base at {base.path} lacks {lacking[0]}, without which no prompt is read; get it again"
            )
        weights = base.tensors(names.values())
        state = {key: weights[name] for key, name in names.items()}
        model = kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    return tokenizer, model.to(device).eval()
