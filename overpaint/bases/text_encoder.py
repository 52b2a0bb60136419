"""From prompts to embeddings: what each text input of a base hands to the denoiser for a word in a sentence."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.func import functional_call

from overpaint.bases.base import Base, BrokenBase
from overpaint.bases.capture import CapturingPipeline, CaughtPrompts, PipelineTextInput, PromptTooLong, read_rows
from overpaint.bases.checkpoint import TensorLocation, read_tensors
from overpaint.bases.layout import LAST, PENULTIMATE, POOLED, TextInput
from overpaint.bases.loading import own_torch_settings
from overpaint.bases.pipelines import check_tokenizer, loading
from overpaint.bases.safetensors_file import SafetensorsFile

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

# The text encoders of a base as models in float32: held whole, or, where they are large, with one layer at a time.
#
# Stable Diffusion XL's would take 3.3 GB. Their layers are read from the base's files each time a batch of prompts comes by,
# turned into float32, used and dropped, and of the tokens' embeddings just those are read that the batch has. On two cores,
# reading costs about a twentieth of what computing costs. Both ways compute the same from the same numbers: where batches are
# equal, so are the bits.


HELD = 600 << 20
"""Bytes in float32. All of a base's text encoders together are held whole up to here; Stable Diffusion 1.x's has 470 MiB."""

BATCH, READ_BATCH = 128, 16
"""Prompts at a time: for a text encoder of SD 1.x's size that is held, fewer for larger ones; and where layers are read."""


class _Read(torch.nn.Module):
    """A layer whose weights are there while it is used; `shell` has their shapes alone."""

    def __init__(self, shell: torch.nn.Module, weights: Callable[[], dict[str, Tensor]]) -> None:
        super().__init__()
        self.shell, self.weights = shell, weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.shell, self.weights(), args, kwargs)


class _Rows(torch.nn.Module):
    """Embeddings of tokens, read when tokens come by; `place` is that of the matrix which has them as rows."""

    def __init__(self, place: TensorLocation, container: SafetensorsFile) -> None:
        super().__init__()
        assert not place.transposed, "its rows would not lie together"
        self.entry, self.container = place.entry, container

    def forward(self, tokens: Tensor) -> Tensor:
        rows, which = read_rows(self.container, self.entry, tokens)
        return rows[which]


@own_torch_settings()
def text_model(base: Base, component: str, device: torch.device | str) -> Any:
    """A text encoder with the weights that the base has, whatever files they lie in, ready to be used.

    What is held follows from the base and the kind of device alone, never from the memory there is. Raises BrokenBase for a
    base that lacks one of its weights.
    """
    import transformers

    rules = base.layout.components[component]
    kind = getattr(transformers, rules.model)
    with loading(component, base.path):
        config = transformers.CLIPTextConfig.from_pretrained(base.config_folder / component, local_files_only=True)
        with torch.device("meta"):
            shell = kind(config)
        names = {key: f"{component}/{rules.canonical(key)}" for key in shell.state_dict()}
        if lacking := sorted(set(names.values()) - base.places.keys()):
            raise BrokenBase(
                f"the base at {base.path} lacks {lacking[0]}, without which no prompt is read; get it again"
            )
        # The memory of an accelerator is its own, and a layer would take longer to be moved there than to be used.
        if torch.device(device).type != "cpu" or _size(base) <= HELD:
            return _held(kind, config, base, names).to(device).eval()
        return _streamed(kind, config, base, names, shell)


def prompts_at_a_time(model: Any) -> int:
    """How many prompts to hand to a text encoder at once, so that large ones need no more memory than small ones."""
    if any(isinstance(layer, _Read) for layer in layers_of(model)):
        return READ_BATCH
    config = model.config
    return max(1, min(BATCH, BATCH * 768 * 12 // int(config.hidden_size * config.num_hidden_layers)))


def layers_of(model: Any) -> torch.nn.ModuleList:
    """The layers of a text encoder, wherever in the model they are."""
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))


def _size(base: Base) -> int:
    """Bytes of all text encoders of a base in float32."""
    components = {text_input.encoder for text_input in base.layout.text_inputs.values()}
    return sum(4 * torch.Size(p.shape).numel() for name, p in base.places.items() if name.split("/")[0] in components)


def _held(kind: Any, config: Any, base: Base, names: dict[str, str]) -> Any:
    weights = base.tensors(names.values())
    state = {key: weights[name] for key, name in names.items()}
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)


def _streamed(kind: Any, config: Any, base: Base, names: dict[str, str], shell: Any) -> Any:
    """The model without its layers and without the embeddings of tokens; in their place, such as are read."""
    layers, where = layers_of(shell), _path_of_layers(shell)
    inside = {key: name for key, name in names.items() if key.startswith(f"{where}.")}
    bare = copy.deepcopy(config)
    bare.num_hidden_layers = 0
    model = _held(kind, bare, base, {key: name for key, name in names.items() if key not in inside}).eval()
    model.config.num_hidden_layers = config.num_hidden_layers
    words = model.get_input_embeddings()
    (key,) = (key for key, held in model.named_parameters() if held is words.weight)
    place = base.places[names[key]]
    model.set_input_embeddings(_Rows(place, base.containers[place.file]))
    held = layers_of(model)
    for number, layer in enumerate(layers.eval()):
        start = f"{where}.{number}."
        part = {key.removeprefix(start): name for key, name in inside.items() if key.startswith(start)}
        held.append(_Read(layer, _reading(base, part)))
    return model


def _path_of_layers(model: Any) -> str:
    layers = layers_of(model)
    where: str = next(path for path, module in model.named_modules() if module is layers)
    return where


def _reading(base: Base, names: dict[str, str]) -> Callable[[], dict[str, Tensor]]:
    """Reads some weights of a base in float32, without keeping the base itself."""
    places, containers = {key: base.places[name] for key, name in names.items()}, base.containers
    return lambda: {key: stored.float() for key, stored in read_tensors(places, containers)}


REMEMBERED = 64 << 20
"""Bytes of embeddings that are kept for all text encoders of a base: 128 prompts of Stable Diffusion XL's larger one."""


class _OutputCache:
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
class _BaseCache:
    """What the text inputs of one text encoder share: its name, the output of each, token ids by text, the newest embeddings."""

    encoder: str
    output: frozenset[str]
    answers: _OutputCache
    tokens: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class TextEncoder:
    """A base's tokenizer and text encoder in float32 on one device, with the output of one text input.

    `output` is the last hidden states, those before the last layer, or the pooled embedding.
    """

    tokenizer: CLIPTokenizer
    model: Any
    output: str
    _memory: _BaseCache = field(repr=False)

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
        return int(self.model.config.projection_dim if self.is_pooled else self.model.config.hidden_size)

    @property
    def length(self) -> int:
        """Tokens in a padded prompt."""
        return int(min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings))

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

    def hidden(self, prompts: Sequence[str], length: int | None = None) -> Tensor:
        """What the U-Net is handed, as the pipeline hands it: float32 [n, length, d]; [n, 1, d] where it is pooled.

        `length`: only the first so many embeddings, to float32 rounding the same; what follows them is not computed, since the
        encoder is causal. A prompt that occurs several times is encoded once.
        """
        unique = list(dict.fromkeys(prompts))
        outputs = self._answers(unique, min(length or self.length, self.length))[self.output]
        if len(unique) == len(prompts):
            return outputs
        place = {prompt: i for i, prompt in enumerate(unique)}
        return outputs[[place[prompt] for prompt in prompts]]

    @own_torch_settings()
    @torch.no_grad()
    def _answers(self, prompts: list[str], length: int) -> dict[str, Tensor]:
        """What every text input of this encoder is handed, [n, length, d].

        The newest answers are kept: text inputs are computed in turn, and concepts are sent to the same sentences.
        """
        answers, key = self._memory.answers, (self._memory.encoder, str(length), *prompts)
        recalled = answers.recall(key)
        if recalled is not None:
            return recalled
        expanded = [self._expanded(prompt) for prompt in prompts]
        ids = self.tokenizer(expanded, truncation=True, max_length=self.length).input_ids
        # A prompt must have its end where the pooled embedding is read.
        width = max(length, *map(len, ids))
        padded = self.tokenizer.pad({"input_ids": ids}, padding="max_length", max_length=width, return_tensors="pt")
        batch = max(1, prompts_at_a_time(self.model) * self.length // width)
        outputs: dict[str, Tensor] = {}
        for start in range(0, len(prompts), batch):
            part_of = slice(start, start + batch)
            for output, part in self._forward(padded.input_ids[part_of], padded.attention_mask[part_of]).items():
                if output not in outputs:
                    outputs[output] = part.new_empty((len(prompts), *part[:, :length].shape[1:]))
                    answers.make_room(_nbytes(outputs))
                outputs[output][start : start + batch] = part[:, :length]
        answers.keep(key, outputs)
        return outputs

    def _forward(self, ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        # As StableDiffusionPipeline does where a configuration asks for it; StableDiffusionXLPipeline never does.
        is_masked = LAST in self._memory.output and getattr(self.model.config, "use_attention_mask", False)
        mask = attention_mask.to(self.model.device) if is_masked else None
        wanted, before = self._memory.output, []
        # Asked for hidden states, the model would keep those of every layer.
        last = layers_of(self.model)[-1]
        hook = last.register_forward_pre_hook(lambda module, args: before.append(args[0]))
        try:
            result = self.model(ids.to(self.model.device), attention_mask=mask)
        finally:
            hook.remove()
        answers = {}
        if LAST in wanted:
            answers[LAST] = result.last_hidden_state
        if PENULTIMATE in wanted:
            answers[PENULTIMATE] = before[0]
        if POOLED in wanted:
            answers[POOLED] = result.text_embeds[:, None]
        return answers

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
    answers = _OutputCache()
    for name, text_input in chosen.items():
        same = [other for other, spec in chosen.items() if spec.encoder == text_input.encoder]
        if same[0] in by_input:
            first = by_input[same[0]]
            by_input[name] = TextEncoder(first.tokenizer, first.model, text_input.output, first._memory)
        else:
            memory = _BaseCache(text_input.encoder, frozenset(chosen[other].output for other in same), answers)
            by_input[name] = TextEncoder(
                _tokenizer(base, text_input), text_model(base, text_input.encoder, device), text_input.output, memory
            )
    return by_input


def _tokenizer(base: Base, text_input: TextInput) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    folder = base.config_folder / text_input.tokenizer
    check_tokenizer(folder)
    with loading("the tokenizer", base.path):
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer
