"""From prompts to embeddings: what each text input of a base hands to the denoiser for a word in a sentence.

`TextEncoder` computes it for the bases whose layout says how; `PipelineTextInput` asks the pipeline itself (`capture`).
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from overpaint.bases.base import Base
from overpaint.bases.capture import CapturingPipeline, CaughtPrompt, Segment, tokenizer_of
from overpaint.bases.encoder_models import (
    FEED_FORWARD,
    LAYER,
    feed_forward_output,
    is_streamed,
    layers_of,
    text_model,
    watched,
)
from overpaint.bases.layout import LAST, PENULTIMATE, POOLED, PROJECTION, TextInput
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.packing import PackedPrompts, Prefix, PrefixStates, attending, common_prefix
from overpaint.bases.pipelines import check_tokenizer, loading
from overpaint.core.encoding import evenly_spaced, json_digest
from overpaint.core.errors import OverpaintError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Answer = TypeVar("Answer")

BATCH, READ_BATCH = 128, 16
"""Prompts at a time: for a text encoder of SD 1.x's size that is held, fewer for larger ones; and where layers are read."""
REMEMBERED = 64 << 20
"""Bytes of embeddings that are kept for all text encoders of a base: 128 prompts of Stable Diffusion XL's larger one. So many
are also kept, for each encoder, of prefixes."""
CAUGHT_BYTES = 256 << 20
"""Bytes of embeddings that are kept for all text inputs of a base."""
SAMPLED_WORDS, LARGE = 256, 1_000_000_000
"""Of the vocabulary of an encoder of so many parameters, so many words at equal distances stand for all."""
_PROBES = ("a photo of it", "a photo of us", "")


class PromptTooLong(OverpaintError):
    """A concept whose tokens lie past the end of what the text encoder reads."""


Question = tuple[object, ...]
"""What can be asked again: it has a hash."""


class _NewestAnswers(Generic[Answer]):
    """The newest answers by what was asked: as many as fit into `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._stored: OrderedDict[Question, tuple[Answer, int]] = OrderedDict()
        self._size = 0

    def recall(self, asked: Question) -> Answer | None:
        if asked not in self._stored:
            return None
        self._stored.move_to_end(asked)
        return self._stored[asked][0]

    def store(self, asked: Question, answer: Answer, size: int) -> None:
        """Unless it is larger than the limit itself."""
        if size <= self.limit:
            self.make_room(size)
            self._stored[asked] = answer, size
            self._size += size

    def make_room(self, size: int) -> None:
        """Forget the oldest until so many bytes fit: before they are computed, or both would be in memory."""
        while self._stored and self._size + size > self.limit:
            self._size -= self._stored.popitem(last=False)[1][1]


@dataclass
class _EncoderCache:
    """What the outputs of one text encoder share: its name, which outputs are wanted, token ids by text, and the newest
    prefixes; with the inputs of the base's other encoders, the newest embeddings and the lock."""

    encoder: str
    output: frozenset[str]
    answers: _NewestAnswers[dict[str, Tensor]]
    prefixes: _NewestAnswers[PrefixStates]
    lock: threading.RLock
    behind: int = 0
    """How many layers follow the one of which the inside is read."""
    tokens: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class TextEncoder:
    """A base's tokenizer and text encoder in float32 on one device, with the output of one text input.

    `output` is the last hidden states, those before the last layer, or the pooled embedding; or what is inside of a layer
    (`feed_forwards`), the last but `_memory.behind`.
    """

    tokenizer: CLIPTokenizer
    model: Any
    output: str
    _memory: _EncoderCache = field(repr=False)

    @classmethod
    def of(cls, base: Base, device: torch.device | str = "cpu", text_input: str = "text_encoder") -> TextEncoder:
        """Load the text encoder of a text input of a base. Raises NotFound for a text input the base lacks."""
        return encoders(base, device, (text_input,))[text_input]

    @property
    def is_pooled(self) -> bool:
        """Whether a prompt is one embedding rather than one per token."""
        return self.output == POOLED

    @property
    def group(self) -> str:
        """What is the same for text inputs that are computed together."""
        return self._memory.encoder

    @property
    def device(self) -> torch.device:
        """Where embeddings are computed."""
        device: torch.device = self.model.device
        return device

    @property
    def begin(self) -> Tensor | None:
        """The embedding with which every prompt begins, float64 [d]; None where a prompt is one embedding."""
        return None if self.is_pooled else self.hidden([""])[0, 0].double()

    @property
    def width(self) -> int:
        """Numbers in one embedding, d."""
        if self.output == FEED_FORWARD:
            return feed_forward_output(self.model, len(self._layers) - 1 - self._memory.behind)[1].in_features
        return int(self.model.config.projection_dim if self.is_pooled else self.model.config.hidden_size)

    @property
    def length(self) -> int:
        """Tokens in a padded prompt."""
        return int(min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings))

    @cached_property
    def reading(self) -> list[Any]:
        """What decides how prompts are read, beside the weights: the configuration and the tokenizer."""
        return [_settings(self.model.config), _rules(self.tokenizer)]

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text without begin, end and padding."""
        # A concept's sentences share their beginnings, and a call of the tokenizer costs most of a millisecond.
        if text not in self._memory.tokens:
            self._memory.tokens[text] = self.tokenizer(self._expanded(text), add_special_tokens=False).input_ids
        return self._memory.tokens[text]

    def _expanded(self, text: str) -> str:
        """A text with each token of a textual inversion that has several vectors written out, as a pipeline writes it."""
        if not self._has_long_tokens:
            return text
        # All of diffusers is loaded with it, which takes seconds that few bases need.
        from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

        tokenizer: Any = self.tokenizer
        expanded: str = TextualInversionLoaderMixin().maybe_convert_prompt(text, tokenizer)
        return expanded

    @cached_property
    def _has_long_tokens(self) -> bool:
        added = self.tokenizer.get_added_vocab()
        return any(f"{token}_1" in added for token in added)

    def hidden(
        self, prompts: Sequence[str], lengths: Sequence[int] | int | None = None, starts: Sequence[int] = ()
    ) -> Tensor:
        """What the U-Net is handed, as the pipeline hands it: float32 [n, length, d]; [n, 1, d] where it is pooled.

        `lengths`: of every prompt, or of each, only the first so many embeddings, to float32 rounding the same; with `starts`,
        of each only from so many on. What else is in a row means nothing. The encoder is causal: what follows is not computed,
        what prompts begin with alike is computed once, and what comes before is kept for the next prompts that begin with it.
        A prompt that occurs several times is encoded once. What is returned may be kept for the next call: do not write to it.
        """
        unique = list(dict.fromkeys(prompts))
        if lengths is None:
            outputs = self._answers(unique, None, ())[self.output]
        else:
            each = [lengths] * len(prompts) if isinstance(lengths, int) else lengths
            ends, begins = dict.fromkeys(unique, 0), dict.fromkeys(unique, self.length)
            for prompt, length, start in zip(prompts, each, starts or [0] * len(prompts), strict=True):
                ends[prompt] = max(ends[prompt], min(length, self.length), 1)
                begins[prompt] = min(begins[prompt], start, ends[prompt] - 1)
            outputs = self._answers(unique, tuple(ends.values()), tuple(begins.values()))[self.output]
        place = {prompt: i for i, prompt in enumerate(unique)}
        return outputs if len(unique) == len(prompts) else outputs[[place[prompt] for prompt in prompts]]

    def _answers(
        self, prompts: list[str], lengths: tuple[int, ...] | None, starts: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """What every text input of this encoder is handed, [n, length, d].

        The newest answers are kept: text inputs are computed in turn, and concepts are sent to the same sentences. One thread
        at a time: they share what is kept, the memory of layers, and how the model attends.
        """
        answers, key = self._memory.answers, (self._memory.encoder, lengths, starts, *prompts)
        with self._memory.lock:
            recalled = answers.recall(key)
            return self._computed(prompts, lengths, starts, key) if recalled is None else recalled

    @own_torch_settings()
    @torch.inference_mode(False)  # what is kept may be read where gradients are wanted
    @torch.no_grad()
    def _computed(
        self, prompts: list[str], lengths: tuple[int, ...] | None, starts: tuple[int, ...], key: Question
    ) -> dict[str, Tensor]:
        answers = self._memory.answers
        expanded = [self._expanded(prompt) for prompt in prompts]
        ids = self.tokenizer(expanded, truncation=True, max_length=self.length).input_ids
        if lengths is None or self._is_masked:
            outputs = self._one_by_one(ids, max(lengths or [self.length]))
        else:
            outputs = self._packed(ids, lengths, starts)
        answers.store(key, outputs, sum(tensor.nbytes for tensor in outputs.values()))
        return outputs

    def _one_by_one(self, ids: list[list[int]], length: int) -> dict[str, Tensor]:
        """The first so many embeddings of prompts, each of which is a row of its own."""
        # A prompt must have its end where the pooled embedding is read.
        width = max(length, *map(len, ids))
        padded = self.tokenizer.pad({"input_ids": ids}, padding="max_length", max_length=width, return_tensors="pt")
        batch = max(1, self._prompts_at_a_time * self.length // width)
        outputs: dict[str, Tensor] = {}
        for start in range(0, len(ids), batch):
            part_of = slice(start, start + batch)
            mask = padded.attention_mask[part_of].to(self.device) if self._is_masked else None
            result, parts = self._forward(padded.input_ids[part_of].to(self.device), mask)
            if POOLED in self._memory.output:
                parts[POOLED] = result.text_embeds[:, None]
            self._gather(outputs, {output: part[:, :length] for output, part in parts.items()}, part_of, len(ids))
        return outputs

    def _packed(self, ids: list[list[int]], lengths: Sequence[int], starts: Sequence[int]) -> dict[str, Tensor]:
        """The first embeddings of prompts, of each so many from so many on; what prompts begin with alike is read once."""
        is_pooled = POOLED in self._memory.output
        width = max(*lengths, *map(len, ids))
        padded = self.tokenizer.pad({"input_ids": ids}, padding="max_length", max_length=width, return_tensors="pt")
        ends = self._ends(padded.input_ids)
        longest = max(lengths)
        if is_pooled:  # a prompt may end behind what is asked for, or within what is to be left out
            lengths = [max(length, end + 1) for length, end in zip(lengths, ends.tolist(), strict=True)]
            starts = [min(start, end) for start, end in zip(starts, ends.tolist(), strict=True)]
        prompts = [tuple(row[:length]) for row, length in zip(padded.input_ids.tolist(), lengths, strict=True)]
        before = self._prefix_states({prompt[:start] for prompt, start in zip(prompts, starts, strict=True)})
        packed = PackedPrompts.of(prompts, self.length, starts if before else (), before)
        batch = max(1, self._prompts_at_a_time * self.length // packed.tokens.shape[1])
        outputs: dict[str, Tensor] = {}
        for start in range(0, len(packed.tokens), batch):
            with before.read_before() if before else nullcontext():
                result, parts = self._forward_packed(packed, slice(start, start + batch))
            here = ((packed.rows >= start) & (packed.rows < start + batch)).nonzero()[:, 0]
            rows, columns = packed.rows[here, None] - start, packed.columns[here]
            parts = {output: part[rows, columns[:, :longest]] for output, part in parts.items()}
            if is_pooled:
                last = result.last_hidden_state[rows, columns.gather(1, ends[here, None])]
                parts[POOLED] = self.model.text_projection(last)
            self._gather(outputs, parts, here, len(ids))
        return outputs

    def _prefix_states(self, prefixes: set[Prefix]) -> PrefixStates | None:
        """What later tokens read of prefixes, which all are read together; None where they are more than one row of tokens, or
        a prompt has none."""
        if not all(prefixes) or len({prefix[: i + 1] for prefix in prefixes for i in range(len(prefix))}) > self.length:
            return None
        ordered = tuple(sorted(prefixes))
        found = self._memory.prefixes.recall(ordered)
        if found is None:
            found = PrefixStates(ordered, self.length, lambda packed: self._forward_packed(packed, slice(None)))
            self._memory.prefixes.store(ordered, found, found.nbytes)
        return found

    def _forward_packed(self, packed: PackedPrompts, rows: slice) -> tuple[Any, dict[str, Tensor]]:
        """What `_forward` says of some rows of packed prompts."""
        sees = packed.sees[rows, None]
        unseen = torch.zeros(sees.shape).masked_fill_(~sees, -torch.inf)
        with attending(self._layers):
            return self._forward(
                packed.tokens[rows].to(self.device), unseen.to(self.device), packed.positions[rows].to(self.device)
            )

    def _gather(self, outputs: dict[str, Tensor], parts: dict[str, Tensor], rows: slice | Tensor, count: int) -> None:
        """Put what some of `count` prompts have into what all of them have."""
        for output, part in parts.items():
            if output not in outputs:
                outputs[output] = part.new_empty((count, *part.shape[1:]))
                self._memory.answers.make_room(sum(tensor.nbytes for tensor in outputs.values()))
            outputs[output][rows] = part

    def _ends(self, ids: Tensor) -> Tensor:
        """Where in each prompt the model reads the pooled embedding: CLIP's oldest configurations name a wrong end."""
        end = self.model.config.eos_token_id
        return (ids if end == 2 else (ids == end).int()).argmax(-1)

    @property
    def _is_masked(self) -> bool:
        """Whether padding is masked: as StableDiffusionPipeline does where a configuration asks for it, and SDXL's never."""
        outputs, behind = self._memory.output, self._memory.behind
        is_last = LAST in outputs or (FEED_FORWARD in outputs and not behind)
        return is_last and bool(getattr(self.model.config, "use_attention_mask", False))

    @cached_property
    def _layers(self) -> nn.ModuleList:
        return layers_of(self.model)  # looking for them takes as long as a short prompt

    @cached_property
    def _prompts_at_a_time(self) -> int:
        """So many that large text encoders need no more memory than small ones."""
        if is_streamed(self.model):
            return READ_BATCH
        config = self.model.config
        return max(1, min(BATCH, BATCH * 768 * 12 // int(config.hidden_size * config.num_hidden_layers)))

    def _forward(
        self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None = None
    ) -> tuple[Any, dict[str, Tensor]]:
        """What the model says of rows of tokens, and of it the hidden states that are handed on."""
        wanted, states = self._memory.output, dict[str, Tensor]()
        # Asked for hidden states, the model would keep those of every layer.
        hooks = [self._layers[-1].register_forward_pre_hook(lambda module, args: states.update({PENULTIMATE: args[0]}))]
        if FEED_FORWARD in wanted:
            hooks += watched(self.model, len(self._layers) - 1 - self._memory.behind, states.__setitem__)
        try:
            result = self.model(tokens, attention_mask=mask, position_ids=positions)
        finally:
            for hook in hooks:
                hook.remove()
        states[LAST] = result.last_hidden_state
        return result, {output: state for output, state in states.items() if output in wanted}

    def first_position(self, template: str, word: str) -> int:
        """The row of `hidden` with the embedding of a word in a template: its first token's (begin-of-text is 0).

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


def _settings(config: Any) -> dict[str, Any]:
    """A configuration without what does not decide what is computed here, in float32, as JSON."""
    ignored = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in found.items() if name not in ignored}


def _rules(tokenizer: Any) -> str:
    """The digest of all that a tokenizer does to a text: its vocabulary, and, where its program says them, its rules."""
    # A processor has a tokenizer; so has ChatGLM's tokenizer, but that one knows no vocabulary.
    if not hasattr(tokenizer, "get_vocab"):
        tokenizer = tokenizer.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any = _without_padding(backend.to_str()) if backend else sorted(tokenizer.get_vocab().items())
    return json_digest([rules, getattr(tokenizer, "model_max_length", None), getattr(tokenizer, "padding_side", None)])


def _without_padding(rules: str) -> str:
    """A tokenizer's rules, as JSON, but for how the last text was cut and padded."""
    # To parse all of it, megabytes of words, would take half a second.
    for name in ('"truncation":', '"padding":'):
        before, key, after = rules.partition(name)
        if key:
            after = after.lstrip()
            rules = before + after[json.JSONDecoder().raw_decode(after)[1] :]
    return rules


class CaughtPrompts:
    """The newest prompts that were caught; where `layers` of text encoders are named, what is inside of these instead.

    Which ones are encoded together follows from the request alone, and so do the bits.
    """

    def __init__(self, pipeline: CapturingPipeline, layers: Mapping[str, int] = MappingProxyType({})) -> None:
        self.pipeline, self._layers = pipeline, layers
        self._newest = _NewestAnswers[list[dict[str, CaughtPrompt]]](CAUGHT_BYTES)

    def of(self, prompts: Sequence[str]) -> dict[str, dict[str, CaughtPrompt]]:
        """What every text input reads of each prompt, by prompt and text input. One thread at a time."""
        unique, count = list(dict.fromkeys(prompts)), self.pipeline.prompts_at_a_time()
        found: dict[str, dict[str, CaughtPrompt]] = {}
        for start in range(0, len(unique), count):
            chunk = tuple(unique[start : start + count])
            with self.pipeline.lock:
                if (caught := self._newest.recall(chunk)) is None:
                    caught = self.pipeline.catch(chunk, self._layers)
                    size = sum(each.embeddings.nbytes for one in caught for each in one.values())
                    self._newest.store(chunk, caught, size)
            found.update(zip(chunk, caught, strict=True))
        return found

    @cached_property
    def probes(self) -> tuple[dict[str, CaughtPrompt], ...]:
        """Two prompts that differ in their ends, and the empty one."""
        caught = self.of(_PROBES)
        return tuple(caught[prompt] for prompt in _PROBES)


@dataclass(eq=False)
class PipelineTextInput:
    """One text input of a base whose prompts are caught. All inputs of a base share one pipeline and what it caught."""

    name: str
    source: CaughtPrompts
    output: str = PROJECTION
    group: str = "pipeline"

    @property
    def _pipeline(self) -> CapturingPipeline:
        return self.source.pipeline

    @property
    def tokenizer(self) -> Any:
        """That of the text encoder by which a concept's tokens are counted."""
        return tokenizer_of(self._pipeline.pipe, self._pipeline.base.text_input(self.name).encoder)

    @property
    def device(self) -> torch.device:
        """Where embeddings are computed."""
        found: torch.device = self._pipeline.pipe.device
        return found

    @cached_property
    def is_pooled(self) -> bool:
        """Whether a prompt is one embedding rather than one per token."""
        return not self.source.probes[0][self.name].segments

    @property
    def width(self) -> int:
        """Numbers in one embedding, d."""
        columns = self._pipeline.base.columns(self.name, self._pipeline.base.projections(self.name)[0])
        return int(columns.stop - columns.start)

    @property
    def length(self) -> int:
        """Tokens that are read of a prompt."""
        limit = self._pipeline.length or self.tokenizer.model_max_length
        return int(min(limit, self.tokenizer.model_max_length))

    @cached_property
    def begin(self) -> Tensor | None:
        """The embedding with which every prompt begins, float64 [d]; None where there is none that is always the same."""
        first, _, empty = (probe[self.name] for probe in self.source.probes)
        for one, other in zip(first.segments[:1], empty.segments[:1], strict=True):
            if self._is_causal(one.call) and one.ids[:1] == other.ids[:1] and 0 in one.rows and 0 in other.rows:
                return empty.embeddings[other.rows[0]].double()
        return None

    def _is_causal(self, call: int) -> bool:
        """Whether what a text encoder makes of a token does not depend on what follows it."""
        if call not in self._causal:
            prompts = [probe[self.name] for probe in self.source.probes[:2]]
            one, other = (next(s for s in prompt.segments if s.call == call) for prompt in prompts)
            shared = common_prefix(one.ids, other.ids)
            rows = [(one.rows[i], other.rows[i]) for i in range(shared) if i in one.rows and i in other.rows]
            a, b = (prompt.embeddings[[pair[i] for pair in rows]] for i, prompt in enumerate(prompts))
            self._causal[call] = bool(rows) and float((a - b).norm()) <= 1e-4 * float(a.norm())
        return self._causal[call]

    @cached_property
    def _causal(self) -> dict[int, bool]:
        return {}

    @cached_property
    def reading(self) -> list[Any]:
        """What decides how prompts are read, beside the weights: configurations, tokenizers, and what the pipeline is asked."""
        pipe = self._pipeline.pipe
        configs = [[name, _settings(encoder.config)] for name, encoder in sorted(self._pipeline.encoders.items())]
        tokenizers = [
            [name, _rules(part)]
            for name, part in sorted(pipe.components.items())
            if hasattr(part, "get_vocab") or hasattr(part, "tokenizer")
        ]
        arguments = {name: repr(value) for name, value in self._pipeline.arguments.items()}
        return [type(pipe).__name__, configs, tokenizers, arguments]

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text without begin, end and padding."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return found

    def first_position(self, template: str, word: str) -> int:
        """Always 0, for all positions count. Raises PromptTooLong when the word would be cut off."""
        if len(self.tokens(template.partition("{}")[0] + word)) >= self.length:
            raise PromptTooLong(
                f"{word!r} in {template!r} ends past the {self.length} tokens this text encoder reads; use a shorter name"
            )
        return 0

    def words(self) -> list[str]:
        """Whole words of the tokenizer's vocabulary, sorted; a sample of them where encoding them all would take days."""
        vocabulary = self.tokenizer.get_vocab()
        whole = {token.removesuffix("</w>") for token in vocabulary if token.endswith("</w>")}
        whole = whole or {token[1:] for token in vocabulary if token[:1] in ("▁", "Ġ")}  # SentencePiece, byte-level BPE
        known = sorted(word for word in whole if len(word) > 1 and word.isalpha() and word.isascii() and word.islower())
        parameters = sum(p.numel() for encoder in self._pipeline.encoders.values() for p in encoder.parameters())
        return evenly_spaced(known, SAMPLED_WORDS) if parameters > LARGE else known

    def hidden(self, prompts: Sequence[str]) -> list[Tensor]:
        """What the projection reads of each prompt, float32 [rows, d]: its tokens, and some positions for its padding."""
        caught = self.source.of(prompts)
        return [caught[prompt][self.name].embeddings for prompt in prompts]

    def keys_and_values(
        self, pairs: Sequence[tuple[str, str]], padding: float, *, own: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Weighted embeddings of both prompts of each pair, where the first differs from the second: float64 [d, m] each.

        Token by token: what is before the first difference, what is behind the last one, what is between them, and padding,
        which weighs as much as `padding` tokens at most. A prompt weighs 1. Where tokens depend on later ones, it differs
        everywhere; so does one that is paired with itself. Without its `own`, what is between the first and the last
        difference is left out, and a prompt that has nothing else, too.
        """
        caught = self.source.of([prompt for pair in pairs for prompt in pair])
        nothing = torch.zeros(0, self.width, dtype=torch.float64, device=self.device)
        keys, values = [nothing], [nothing]
        for prompt, other in pairs:
            a, b = caught[prompt][self.name], caught[other][self.name]
            rows = self._lined_up(a, b, padding, own)
            roots = torch.tensor([weight for _, _, weight in rows], dtype=torch.float64).sqrt()[:, None].to(self.device)
            keys.append(a.embeddings[[row for row, _, _ in rows]].double() * roots)
            values.append(b.embeddings[[row for _, row, _ in rows]].double() * roots)
        return torch.cat(keys).T, torch.cat(values).T

    def keys_and_mean_values(self, pairs: Sequence[tuple[str, Sequence[str]]], padding: float) -> tuple[Tensor, Tensor]:
        """As `keys_and_values`, with the mean over several other prompts in place of one: float64 [d, m] each.

        The mean is over those that line up with the prompt as most of them do; one of the same tokens is left out, unless
        all are.
        """
        caught = self.source.of([prompt for prompt, _ in pairs])
        keys, values = [], []
        for prompt, others in pairs:
            among = self.source.of(others)
            here = caught[prompt][self.name]
            sides = [among[other][self.name] for other in others if other != prompt]
            sides = [side for side in sides if self.is_pooled or not _same_tokens(here, side)] or sides
            by_rows: dict[tuple[tuple[int, float], ...], list[Tensor]] = {}
            for side in sides:
                rows = self._lined_up(here, side, padding, True)
                pattern = tuple((row, weight) for row, _, weight in rows)
                by_rows.setdefault(pattern, []).append(side.embeddings[[target for _, target, _ in rows]].double())
            own, same = max(by_rows.items(), key=lambda item: len(item[1]))
            roots = torch.tensor([weight for _, weight in own], dtype=torch.float64).sqrt()[:, None].to(self.device)
            keys.append(here.embeddings[[row for row, _ in own]].double() * roots)
            values.append(torch.stack(same).mean(0) * roots)
        return torch.cat(keys).T, torch.cat(values).T

    def last_keys_and_values(self, pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """The last token in which each prompt differs from the other, and its counterpart: float64 [d, m] each.

        Without a counterpart, it is the token before; where there is none before, the one that follows.
        """
        caught = self.source.of([prompt for pair in pairs for prompt in pair])
        rows = [row for a, b in pairs for row in _last_rows(caught[a][self.name], caught[b][self.name])]
        return torch.stack([k for k, _ in rows], 1).double(), torch.stack([v for _, v in rows], 1).double()

    def _lined_up(self, a: CaughtPrompt, b: CaughtPrompt, padding: float, own: bool) -> list[tuple[int, int, float]]:
        """Rows of two prompts that answer each other, with weights that make 1 together; segments weigh the same."""
        if self.is_pooled:
            return [(0, 0, 1.0)]
        others = {segment.call: segment for segment in b.segments}
        found = []
        for segment in a.segments:
            if rows := self._lined_up_in(segment, others.get(segment.call), a is b, padding, own):
                total = sum(weight for _, _, weight in rows)
                found.append([(row, other, weight / total) for row, other, weight in rows])
        if not found and own:
            raise PromptTooLong(
                f"two prompts that differ past the end of what {self.name} reads are the same to it; use shorter ones"
            )
        return [(row, other, weight / len(found)) for rows in found for row, other, weight in rows]

    def _lined_up_in(
        self, one: Segment, other: Segment | None, whole: bool, padding: float, own: bool
    ) -> list[tuple[int, int, float]]:
        if other is None:
            return []
        before = common_prefix(one.ids, other.ids)
        start = before if self._is_causal(one.call) and not whole else 0
        end = len(one.ids) - _common_suffix(one.ids, other.ids, before)
        chosen = {i: row for i, row in one.rows.items() if i >= start and (own or not before <= i < end)}
        rows = [
            (row, other.rows[target], 1.0)
            for index, row in chosen.items()
            if (target := _counterpart(index, one.ids, other.ids, before)) in other.rows
        ]
        share = min(padding, one.padded) / max(1, len(one.padding))
        if other.padding:
            rows += [(row, other.padding[min(i, len(other.padding) - 1)], share) for i, row in enumerate(one.padding)]
        return rows


@dataclass(eq=False)
class PipelineLayer(PipelineTextInput):
    """What is inside of a layer of a text encoder, where prompts are caught; `name` is `COMPONENT/OUTPUT`."""

    matrix: nn.Linear = field(kw_only=True)

    @property
    def tokenizer(self) -> Any:
        return tokenizer_of(self._pipeline.pipe, self.name.partition("/")[0])

    @property
    def width(self) -> int:
        return self.matrix.in_features if self.output == FEED_FORWARD else self.matrix.out_features


def _same_tokens(a: CaughtPrompt, b: CaughtPrompt) -> bool:
    """Whether two prompts are the same to every text encoder."""
    return [segment.ids for segment in a.segments] == [segment.ids for segment in b.segments]


def _common_suffix(a: Sequence[int], b: Sequence[int], before: int) -> int:
    return min(common_prefix(a[::-1], b[::-1]), len(a) - before, len(b) - before)


def _counterpart(index: int, ids: Sequence[int], other: Sequence[int], before: int) -> int:
    """The index in `other` of the token that stands where `ids` has one."""
    after = _common_suffix(ids, other, before)
    middle, theirs = len(ids) - before - after, len(other) - before - after
    if index < before:
        return index
    if index >= len(ids) - after:
        return len(other) - len(ids) + index
    return min(before + (index - before) * theirs // middle, len(other) - 1)


def _last_rows(a: CaughtPrompt, b: CaughtPrompt) -> Iterator[tuple[Tensor, Tensor]]:
    """The embeddings of the last token that differs, and of its counterpart, in each segment."""
    if not a.segments:
        yield a.embeddings[0], b.embeddings[0]
    others = {segment.call: segment for segment in b.segments}
    for one in a.segments:
        other = others[one.call]
        before = common_prefix(one.ids, other.ids)
        after = _common_suffix(one.ids, other.ids, before)
        last, target = len(one.ids) - after - 1, max(0, len(other.ids) - after - 1)
        if last in one.rows and target in other.rows:
            yield a.embeddings[one.rows[last]], b.embeddings[other.rows[target]]


AnyTextEncoder: TypeAlias = "TextEncoder | PipelineTextInput"
"""Who gives the embeddings of a text input."""


def text_sources(base: Base, device: torch.device | str = "cpu") -> Mapping[str, AnyTextEncoder]:
    """For every text input of a base, who gives its embeddings: its text encoder, or the whole pipeline where it is caught."""
    if not base.layout.is_caught:
        return encoders(base, device)
    prompts = CaughtPrompts(CapturingPipeline.of(base, device))
    return {name: PipelineTextInput(name, prompts) for name in base.text_inputs}


def encoders(
    base: Base, device: torch.device | str = "cpu", text_inputs: Sequence[str] | None = None
) -> dict[str, TextEncoder]:
    """A text encoder for each text input of a base (or each of `text_inputs`), in order; those of one model share it.

    Asked for the same prompts one after the other, text inputs that share a model compute once. Raises NotFound for a text
    input the base lacks.
    """
    chosen = {name: base.text_input(name) for name in (base.text_inputs if text_inputs is None else text_inputs)}
    by_input: dict[str, TextEncoder] = {}
    answers, lock = _NewestAnswers[dict[str, Tensor]](REMEMBERED), threading.RLock()
    for name, text_input in chosen.items():
        same = [other for other, spec in chosen.items() if spec.encoder == text_input.encoder]
        if same[0] in by_input:
            first = by_input[same[0]]
            by_input[name] = TextEncoder(first.tokenizer, first.model, text_input.output, first._memory)
        else:
            outputs = frozenset(chosen[other].output for other in same)
            prefixes = _NewestAnswers[PrefixStates](REMEMBERED)
            memory = _EncoderCache(text_input.encoder, outputs, answers, prefixes, lock)
            model = text_model(base, text_input.encoder, torch.device(device))
            by_input[name] = TextEncoder(_tokenizer(base, text_input), model, text_input.output, memory)
    return by_input


@dataclass(frozen=True)
class FeedForward:
    """The last matrix W of a feed-forward part: that of the last layer of a text encoder that decides all that is handed on.

    `name` is its canonical name; `reads` gives the embeddings that it reads, as wide as W's rows are long, and `gives` what
    the layer makes of them: they rise by D times what is read when W becomes W + D.
    """

    name: str
    reads: AnyTextEncoder
    gives: AnyTextEncoder


def feed_forwards(base: Base, sources: Mapping[str, AnyTextEncoder]) -> list[FeedForward]:
    """That of each text encoder of a base whose text inputs have these sources (`text_sources`).

    Raises OverpaintError for a text encoder in which no change of such a matrix can be solved for.
    """
    groups = {source.group: source for source in sources.values()}
    first = next(iter(groups.values()))
    if isinstance(first, PipelineTextInput):
        return _caught_feed_forwards(base, first.source.pipeline)
    found: list[FeedForward] = []
    for component, source in groups.items():
        assert isinstance(source, TextEncoder)
        outputs = {each.output for each in base.layout.text_inputs.values() if each.encoder == component}
        # The pooled embedding is read behind the last layer; what comes before it decides it, too.
        behind = int(PENULTIMATE in outputs)
        answers, prefixes = _NewestAnswers[dict[str, Tensor]](REMEMBERED), _NewestAnswers[PrefixStates](REMEMBERED)
        inside = frozenset((FEED_FORWARD, LAYER))
        memory = _EncoderCache(component, inside, answers, prefixes, source._memory.lock, behind)
        reads, gives = (TextEncoder(source.tokenizer, source.model, each, memory) for each in (FEED_FORWARD, LAYER))
        if (number := len(layers_of(source.model)) - 1 - behind) < 0:
            raise OverpaintError(
                f"{component} of the base at {base.path} has one layer, before which it is read, so no matrix inside of it "
                "decides what is handed on; use `separable`"
            )
        path, _ = feed_forward_output(source.model, number)
        found.append(FeedForward(_canonical(base, component, path), reads, gives))
    return found


def _caught_feed_forwards(base: Base, pipeline: CapturingPipeline) -> list[FeedForward]:
    layers = {component: pipeline.deciding_layer(component) for component in pipeline.encoders}
    source, found = CaughtPrompts(pipeline, layers), list[FeedForward]()
    for component, number in layers.items():
        path, matrix = feed_forward_output(pipeline.encoders[component], number)
        reads, gives = (
            PipelineLayer(f"{component}/{output}", source, output, matrix=matrix) for output in (FEED_FORWARD, LAYER)
        )
        found.append(FeedForward(_canonical(base, component, path), reads, gives))
    return found


def _canonical(base: Base, component: str, path: str) -> str:
    return f"{component}/{base.layout.components[component].canonical(f'{path}.weight')}"


def _tokenizer(base: Base, text_input: TextInput) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    folder = base.config_folder / text_input.tokenizer
    check_tokenizer(folder)
    with loading("the tokenizer", base.path):
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer
