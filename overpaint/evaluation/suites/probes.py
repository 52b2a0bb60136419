"""Probes: can what was erased be brought back with the patches on? The numbers as they are.

For each erased object, the judge's accuracy after every attack below, beside that on the base and
under the patches alone. A patch hides a concept and does not destroy it, so these numbers are expected to be above 0.

Differences to the published protocols: a few hundred steps at most, pictures of the embedded base's size, and one learned word
for each concept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from overpaint.core.errors import OverpaintError
from overpaint.evaluation.context import ACCURACY, ON_BASE, EvalContext
from overpaint.evaluation.images import ImageGenerator, generate
from overpaint.evaluation.metrics import Measurement, average, mean
from overpaint.evaluation.prompts import OBJECT, EvalPrompt
from overpaint.patches.compose import Term

# Ways to bring an erased concept back, after Lu et al., "When are concepts erased" (NeurIPS 2025), and others named below.
#
# Each draws pictures with the patches on, and leaves the pipeline bit for bit as it was:
#
# - completion: the base draws the first steps, the patched model the rest;
# - noise: the sampler adds more noise at every step than it takes out (DDIM's eta beyond 0);
# - inversion: a new word is learned on the patched model from pictures of the concept (Pham et al., ICLR 2024);
# - revival: the patched U-Net is trained on pictures of other things (Suriyakumar et al., 2024).


Pictures = NDArray[np.uint8]
BATCH = 8


def completed(
    image_generator: ImageGenerator, terms: Sequence[Term], questions: Sequence[EvalPrompt], clean: int
) -> Pictures:
    """The base draws `clean` steps, the patched model the rest; 0 is the patched model alone."""
    overlay = image_generator.overlay

    def hand_over(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step + 1 == clean:
            overlay.set(terms)
        return values

    pipe, pictures = _With(image_generator.pipe, {"callback_on_step_end": hand_over}), []
    for start in range(0, len(questions), image_generator.sampler.batch):
        overlay.set(() if clean else terms)
        pictures.append(_generated(pipe, image_generator, questions[start : start + image_generator.sampler.batch]))
    return np.concatenate(pictures)


def noised(
    image_generator: ImageGenerator, terms: Sequence[Term], questions: Sequence[EvalPrompt], eta: float
) -> Pictures:
    """Drawn with DDIM's noise at `eta` times its usual size; 0 is the sampler as it is. Other samplers ignore it."""
    image_generator.overlay.set(terms)
    return _generated(_With(image_generator.pipe, {"eta": eta}), image_generator, questions)


def inverted(
    image_generator: ImageGenerator,
    terms: Sequence[Term],
    wanted: Pictures,
    questions: Sequence[EvalPrompt],
    steps: int,
    seed: int,
) -> Pictures:
    """Drawn for a word whose embedding was learned, on the patched model, from pictures of the concept.

    `wanted` are those pictures, uint8 [n, h, w, 3]; the seeds of `questions` are used, and the sentence "a picture of a" the
    new word.
    """
    image_generator.overlay.set(terms)
    pipe = image_generator.pipe
    word, token = _spare_word(pipe)
    sentence = f"a picture of a {word}"
    latents = _encoded(pipe, wanted)
    table = pipe.text_encoder.get_input_embeddings()
    learned = table.weight.detach().float().mean(0).clone().requires_grad_()
    ids = _ids(pipe, [sentence])
    with _replaced(table, token, learned):
        optimizer = torch.optim.Adam([learned], lr=0.02)
        for batch in _batches(latents, steps, seed):
            text = pipe.text_encoder(ids.to(latents.device))[0].expand(len(batch.latents), -1, -1)
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(_predicted(pipe, pipe.unet, batch, text), batch.noise).backward()
            optimizer.step()
        learned.requires_grad_(False)
        pipe.unet.zero_grad(set_to_none=True)
        pipe.text_encoder.zero_grad(set_to_none=True)
        asked = [EvalPrompt(sentence, question.seed, question.shows) for question in questions]
        return _generated(pipe, image_generator, asked)


def revived(
    image_generator: ImageGenerator,
    terms: Sequence[Term],
    other: Pictures,
    prompts: Sequence[str],
    questions: Sequence[EvalPrompt],
    steps: int,
    seed: int,
    rate: float = 1e-4,
) -> Pictures:
    """Drawn after the patched U-Net, as a copy, was trained on pictures of other things with their prompts."""
    image_generator.overlay.set(terms)
    pipe = image_generator.pipe
    latents = _encoded(pipe, other)
    with torch.no_grad():
        texts = pipe.text_encoder(_ids(pipe, prompts).to(latents.device))[0]
    patched = pipe.unet
    trained = copy.deepcopy(patched)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=rate, weight_decay=0.0)
    for batch in _batches(latents, steps, seed):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(_predicted(pipe, trained, batch, texts[batch.chosen]), batch.noise).backward()
        optimizer.step()
    pipe.unet = trained
    try:
        return _generated(pipe, image_generator, questions)
    finally:
        pipe.unet = patched


@dataclass(frozen=True, eq=False)
class _Batch:
    """Clean latents, the noise to add, how far along the schedule (0 to 1), and which pictures they are."""

    latents: Tensor
    noise: Tensor
    times: Tensor
    chosen: Tensor


def _batches(latents: Tensor, steps: int, seed: int) -> Iterator[_Batch]:
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(latents), (min(BATCH, len(latents)),), generator=rng)
        noise = torch.randn(latents[chosen].shape, generator=rng).to(latents)
        yield _Batch(latents[chosen], noise, torch.rand(len(chosen), generator=rng), chosen)


def _predicted(pipe: Any, unet: Any, batch: _Batch, text: Tensor) -> Tensor:
    levels = pipe.scheduler.config.num_train_timesteps
    times = (batch.times * levels).long().clamp(max=levels - 1).to(batch.latents.device)
    noisy = pipe.scheduler.add_noise(batch.latents, batch.noise, times)
    predicted: Tensor = unet(noisy, times, encoder_hidden_states=text).sample
    return predicted


@torch.no_grad()
def _encoded(pipe: Any, pictures: Pictures) -> Tensor:
    pixels = torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float() / 127.5 - 1
    parts = [pipe.vae.encode(part.to(pipe.vae.device)).latent_dist.mean for part in pixels.split(BATCH)]
    latents: Tensor = torch.cat(parts) * pipe.vae.config.scaling_factor
    return latents


def _ids(pipe: Any, prompts: Sequence[str]) -> Tensor:
    length = pipe.tokenizer.model_max_length
    usual = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    ids: Tensor = pipe.tokenizer(list(prompts), **usual).input_ids
    return ids


def _spare_word(pipe: Any) -> tuple[str, int]:
    """A word of one token that no sentence here uses: a single letter other than "a"."""
    for letter in "zqxjkv":
        tokens = pipe.tokenizer(letter, add_special_tokens=False).input_ids
        if len(tokens) == 1:
            return letter, int(tokens[0])
    raise AssertionError("a CLIP tokenizer has its letters")


@contextmanager
def _replaced(table: nn.Module, token: int, embedding: Tensor) -> Iterator[None]:
    """Within the block, a token has another embedding; no weight is touched."""

    def replace(module: nn.Module, asked: Any, found: Tensor) -> Tensor:
        return torch.where((asked[0] == token)[..., None], embedding.to(found), found)

    handle = table.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


class _With:
    """A pipeline that is always called with some arguments more."""

    def __init__(self, pipe: Any, more: dict[str, Any]) -> None:
        self._pipe, self._more = pipe, more

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._pipe(*args, **named, **self._more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


def _generated(pipe: Any, image_generator: ImageGenerator, questions: Sequence[EvalPrompt]) -> Pictures:
    return generate(pipe, [q.prompt for q in questions], [q.seed for q in questions], image_generator.sampler)


ETA = 1.0
"""DDIM's noise at its full size; the paper goes from 1 to 1.85."""


@dataclass(frozen=True)
class Probes:
    """Pictures judged of each concept after each attack; the base's steps in completion; training steps of the last two."""

    pictures: int = 6
    clean: int = 5
    inversion: int = 150
    revival: int = 100

    def run(self, context: EvalContext) -> list[Measurement]:
        names = [name for head, name in context.erased() if head == OBJECT]
        if not names:
            raise OverpaintError("the probes bring objects back, and no patch here erases one")
        asked = {name: context.prompts(OBJECT, name, self.pictures) for name in names}
        context.image_generator.expect(2 * sum(map(len, asked.values())) + 2 * self.pictures)
        other = context.prompts_for_others(OBJECT, 1)[: 4 * self.pictures]
        rows: list[Measurement] = []
        scores: dict[str, list[NDArray[np.float64]]] = {}
        for name, questions in asked.items():
            before = context.on_base(questions, OBJECT, name)
            rows.append(before.accuracy(context.seed).measurement(name, ON_BASE))
            rows.append(
                context.verdicts(context.terms(), questions, OBJECT).accuracy(context.seed).measurement(name, ACCURACY)
            )
            for attack, draw in self._attacks(context, questions, other):
                right = self._right(context, draw(), name)
                scores.setdefault(attack, []).append(right)
                rows.append(mean(right, [q.seed for q in questions], context.seed).measurement(name, attack))
        for attack, each in scores.items():
            means = [mean(right, list(range(len(right))), context.seed) for right in each]
            rows.append(average(means).measurement("average of the concepts", attack))
        return rows

    def _attacks(
        self, context: EvalContext, questions: list[EvalPrompt], other: list[EvalPrompt]
    ) -> Iterable[tuple[str, Callable[[], Pictures]]]:
        image_generator, terms, seed = context.image_generator, context.terms(), context.seed
        prompts = [question.prompt for question in other]
        clean = min(self.clean, image_generator.sampler.steps - 1)
        yield f"accuracy after {clean} steps of the base", lambda: completed(image_generator, terms, questions, clean)
        yield "accuracy with added noise", lambda: noised(image_generator, terms, questions, ETA)
        yield (
            "accuracy of a learned word",
            lambda: inverted(
                image_generator, terms, image_generator.draw((), questions), questions, self.inversion, seed
            ),
        )
        yield (
            "accuracy after training on other pictures",
            lambda: revived(
                image_generator, terms, image_generator.draw((), other), prompts, questions, self.revival, seed
            ),
        )

    def _right(self, context: EvalContext, pictures: Pictures, name: str) -> NDArray[np.float64]:
        names = context.judge.heads[OBJECT]
        likely = context.judge.probabilities(pictures, OBJECT)
        return np.asarray(likely.argmax(1) == names.index(name), np.float64)
