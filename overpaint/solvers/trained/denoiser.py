"""One contract for all denoisers on which solvers train, so that a method is written once and runs on each of them.

What a denoiser reads of a prompt is a `Conditioning`, made by the pipeline's own `encode_prompt`; it predicts noise or velocity
of a noised latent x_t; `noised` forms such latents and what should be predicted of them; `sampler` walks from noise to a
picture. Diffusion transformers are trained on straight paths (Liu et al., arXiv 2209.03003): `x_t = (1 - s) x_0 + s noise`
with `s = t / 1000`, and predict `noise - x_0`. Differences of predictions under two prompts mean the same for noise and for
velocity, up to a factor that depends on t alone: losses that compare predictions are those of the papers on every base.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from threading import Lock
from types import SimpleNamespace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from overpaint.bases.base import Base
from overpaint.bases.capture import CapturingPipeline, prompt_length
from overpaint.bases.layout import Layout
from overpaint.bases.loading import quiet_loading
from overpaint.bases.pipelines import pipeline_beside
from overpaint.bases.text_encoder import AnyTextEncoder, CaughtPrompts, PipelineTextInput, TextEncoder
from overpaint.solvers.problem import EditProblem, Unsolvable

TOGETHER = 16
"""At most so many latents are denoised, or prompts encoded, at once while nothing is trained."""


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What a denoiser reads of n prompts: `sequence` [n, length, d], and where there is one, `pooled` [n, d]."""

    sequence: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, which: Any) -> Conditioning:
        return self.map(lambda part: part[which])

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        return self.sequence.device

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The sequence, and the pooled embeddings where there are some."""
        return (self.sequence,) if self.pooled is None else (self.sequence, self.pooled)

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """The same with each part changed alike."""
        return Conditioning(*(change(part) for part in self.parts))

    def repeat(self, times: int) -> Conditioning:
        """All prompts, so many times over."""
        return self.map(lambda part: part.repeat(times, *[1] * (part.ndim - 1)))

    def expand(self, count: int) -> Conditioning:
        """One prompt as `count`, without a copy."""
        return self.map(lambda part: part.expand(count, *part.shape[1:]))

    @classmethod
    def cat(cls, *several: Conditioning) -> Conditioning:
        """Prompts one after the other."""
        return cls(*(torch.cat(parts) for parts in zip(*(each.parts for each in several), strict=True)))

    def drift(self, other: Conditioning) -> Tensor:
        """The mean squared difference of each part, added up."""
        pairs = zip(self.parts, other.parts, strict=True)
        return torch.stack([nn.functional.mse_loss(mine, theirs) for mine, theirs in pairs]).sum()


@dataclass(frozen=True, eq=False)
class InputColumns:
    """Where a text input is in a conditioning: the columns of the pooled embeddings, or of the sequence."""

    is_pooled: bool
    columns: slice

    @property
    def width(self) -> int:
        """Numbers in one embedding of this text input."""
        return int(self.columns.stop - self.columns.start)


@dataclass(frozen=True, eq=False)
class Denoiser(ABC):
    """A base's models: frozen, in float32, computing in `dtype`.

    Modules, parameters and scheduler are copies, so that nobody else sees a hook, a processor, a cast or a parameter that takes
    another's place. The values of the parameters are those that were loaded for the first concept, in the same memory: whoever
    trains one puts a copy in its place (`adapters.own_parameters`). `encoder` knows the tokens and words of the base's first text
    input; `pictures` has what the base has drawn to train on, for whoever asks for the same.
    """

    LAYOUT: ClassVar[str]
    POOLED: ClassVar[str] = ""
    """The text input that is pooled, if any."""

    base: Base
    pipe: Any
    encoder: AnyTextEncoder
    device: torch.device
    dtype: torch.dtype = torch.float32
    pictures: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, problem: EditProblem, *, precision: str = "fp32", checkpoint: bool = False, shared: bool = True
    ) -> Denoiser:
        """The models of a problem's base on its device; not `shared`, with weights of its own, which may be changed in place.

        What is shared is kept for as long as the base is open, or until `releasing` ends.
        Raises Unsolvable for a base that no such contract serves.
        """
        base, device = problem.base, problem.device
        if reason := unserved(base.layout):
            raise Unsolvable(reason)
        kind = _DENOISERS[base.layout.name]
        loaded = _loaded(kind, base, device) if shared else LoadedPipeline.of(kind, base, device)
        pipe = loaded.working_copy() if shared else loaded.pipe
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        encoder = loaded.encoder or kind._encoder(base, pipe, device)
        model = kind(base, pipe, encoder, device, dtype, loaded.pictures)
        if model.latent_channels != pipe.vae.config.latent_channels:
            raise Unsolvable(
                "solvers that train know denoisers that draw from a prompt alone, and this base also reads a picture "
                f"({base.pipeline_class}): use `separable`, whose patches fit it as they fit any"
            )
        if checkpoint:
            model.network.enable_gradient_checkpointing()
        return model

    @classmethod
    def _shared_encoder(cls, base: Base, device: torch.device) -> TextEncoder | None:
        """A text encoder that needs no pipeline, for all concepts of a base."""
        return None

    @classmethod
    def _encoder(cls, base: Base, pipe: Any, device: torch.device) -> AnyTextEncoder:
        # Prompts are encoded by the pipeline: what is asked of this one is tokens alone, so that it needs no models of its own.
        length = prompt_length(base, type(pipe))
        arguments = {} if length is None else {"max_sequence_length": length}
        models = {name: getattr(pipe, name) for name in base.layout.encoders(base.names)}
        source = CapturingPipeline(base, pipe, nn.Identity(), {}, models, {}, arguments)
        return PipelineTextInput(base.text_inputs[0], CaughtPrompts(source))

    @property
    @abstractmethod
    def network(self) -> Any:
        """The module that predicts."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        side = self._side(self.network.config.sample_size)
        return self.latent_channels, side, side

    @property
    def latent_channels(self) -> int:
        """Channels that the denoiser reads; more than the autoencoder has where it reads a picture too."""
        return int(self.network.config.in_channels)

    @property
    @abstractmethod
    def levels(self) -> int:
        """Timesteps of the noise schedule; 0 has the least noise."""

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the pictures that are trained on."""
        return self.shape[1] * self.pipe.vae_scale_factor, self.shape[2] * self.pipe.vae_scale_factor

    def __call__(self, x: Tensor, t: Tensor, text: Conditioning, guidance: float = 1.0) -> Tensor:
        """What the denoiser predicts (noise, or velocity where the base was trained so): float32, of the shape of x.

        `x` is [n, c, h, w], `t` timesteps [n]. `guidance` is what a model that was distilled for guidance is told.
        """
        # Without the cache: a weight cast while nothing was recorded would be used again where gradients are wanted.
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False):
            predicted = self._predict(x, t, text, guidance)
        return predicted.float()

    @abstractmethod
    def _predict(self, x: Tensor, t: Tensor, text: Conditioning, guidance: float) -> Tensor: ...

    def both(self, x: Tensor, t: Tensor, first: Conditioning, second: Conditioning) -> tuple[Tensor, Tensor]:
        """The predictions under two texts, in one pass."""
        predicted = self(x.repeat(2, 1, 1, 1), t.repeat(2), Conditioning.cat(first, second))
        return predicted[: len(x)], predicted[len(x) :]

    def guided(self, x: Tensor, t: Tensor, text: Conditioning, guidance: float) -> Tensor:
        """The prediction by which the pipeline draws: away from that of the unconditional prompt, by `guidance`."""
        named, unnamed = self.both(x, t, text, self.unconditional.expand(len(x)))
        return unnamed + guidance * (named - unnamed)

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """What the denoiser reads of prompts by the pipeline's own text encoders, with gradients where they are trained."""

    @torch.no_grad()
    def hidden(self, prompts: Sequence[str]) -> Conditioning:
        """What the denoiser of the base reads of prompts: asked for before anything is trained, or while it is off."""
        unique = list(dict.fromkeys(prompts))
        place = {prompt: i for i, prompt in enumerate(unique)}
        parts = [self.encode(unique[start : start + TOGETHER]) for start in range(0, len(unique), TOGETHER)]
        return Conditioning.cat(*parts)[[place[prompt] for prompt in prompts]]

    @cached_property
    def unconditional(self) -> Conditioning:
        """What the pipeline guides away from: one prompt."""
        return self.hidden([""])

    @cached_property
    def inputs(self) -> Mapping[str, InputColumns]:
        """Where each text input of the base is in a conditioning, in the order of columns."""
        found = {
            name: InputColumns(name == self.POOLED, self.base.columns(name, self.base.projections(name)[0]))
            for name in self.base.text_inputs
        }
        return dict(sorted(found.items(), key=lambda item: (item[1].is_pooled, item[1].columns.start)))

    def mapped(self, text: Conditioning, maps: Mapping[str, Callable[[Tensor], Tensor]]) -> Conditioning:
        """A conditioning with every text input sent through a map of its own."""
        parts = []
        for is_pooled, part in enumerate(text.parts):
            here = {name: place for name, place in self.inputs.items() if place.is_pooled == bool(is_pooled)}
            parts.append(torch.cat([maps[name](part[..., place.columns]) for name, place in here.items()], -1))
        return Conditioning(*parts)

    def time(self, level: Tensor) -> Tensor:
        """The timesteps [n] of levels of the schedule [n], on this device."""
        return level.to(self.device)

    @abstractmethod
    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Latents x_t at timesteps t [n]."""

    @abstractmethod
    def goal(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What should be predicted of latents with noise."""

    def noised(self, latents: Tensor, random: torch.Generator, batch: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """`batch` of the latents with noise of random levels: x_t, t, what should be predicted, and which they are.

        No latent comes twice before all have come once.
        """
        order = torch.cat([torch.randperm(len(latents), generator=random) for _ in range(-(-batch // len(latents)))])
        which = order[:batch].tolist()
        chosen = latents[which]
        t = self.time(torch.randint(self.levels, (batch,), generator=random))
        noise = torch.randn(chosen.shape, generator=random).to(self.device)
        return self.add_noise(chosen, noise, t), t, self.goal(chosen, noise, t), which

    @abstractmethod
    def sampler(self, steps: int) -> Any:
        """What walks from noise in so many steps: `timesteps`, `init_noise_sigma`, `step(prediction, t, x).prev_sample`."""

    def encoded(self, pixels: Tensor, random: torch.Generator) -> Tensor:
        """Latents of pictures [n, 3, h, w] in [-1, 1], as the denoiser knows them."""
        config = self.pipe.vae.config
        found: Tensor = self.pipe.vae.encode(pixels.to(self.device)).latent_dist.sample(random)
        if getattr(config, "latents_mean", None) and getattr(config, "latents_std", None):
            mean, deviation = (
                torch.tensor(each, device=self.device).view(1, -1, 1, 1)
                for each in (config.latents_mean, config.latents_std)
            )
            scale: Tensor = config.scaling_factor / deviation
            return (found - mean) * scale
        shift, factor = float(getattr(config, "shift_factor", None) or 0), float(config.scaling_factor)
        return (found - shift if shift else found) * factor

    def drawn(
        self, prompts: Sequence[str], steps: int, guidance: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Latents of what the pipeline draws, [n, c, h, w]: one for each prompt, each with a generator of its own."""
        height, width = self.pixels
        found: Tensor = self.pipe(
            prompt=list(prompts),
            height=height,
            width=width,
            num_inference_steps=min(steps, self.levels - 1),
            guidance_scale=guidance,
            generator=list(generators),
            output_type="latent",
            **self._length_argument,
        ).images
        return found

    @cached_property
    def _length_argument(self) -> dict[str, int]:
        """How many tokens are read, as an argument of the pipeline, where it has one."""
        length = prompt_length(self.base, type(self.pipe))
        return {} if length is None else {"max_sequence_length": length}

    def _side(self, latents: int) -> int:
        """The side of a latent: of pictures as large as the base's `overpaint.json` says, else of `latents`."""
        size = self.base.extras.get("size")
        return int(size) // int(self.pipe.vae_scale_factor) if size else latents


@dataclass(frozen=True, eq=False)
class UNetDenoiser(Denoiser):
    """What U-Nets share: noise or velocity as their schedule says."""

    @property
    def network(self) -> Any:
        return self.pipe.unet

    @property
    def levels(self) -> int:
        return len(self.pipe.scheduler.alphas_cumprod)

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        found: Tensor = self._noise_schedule.add_noise(clean, noise, t)
        return found

    def goal(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self._noise_schedule.config.prediction_type != "v_prediction":
            return noise
        velocity: Tensor = self._noise_schedule.get_velocity(clean, noise, t)
        return velocity

    @cached_property
    def _noise_schedule(self) -> Any:
        """The levels of noise that the base was trained on.

        Not the pipeline's scheduler: Euler's, which SDXL is published with, and others know the few levels of the last drawing.
        """
        return self._ddim()

    def _ddim(self) -> Any:
        with quiet_loading():
            from diffusers import DDIMScheduler

            return DDIMScheduler.from_config(self.pipe.scheduler.config)

    def sampler(self, steps: int) -> Any:
        """A DDIM scheduler (Song et al., arXiv 2010.02502) of the base's noise schedule with so many timesteps."""
        found = self._ddim()
        # With the offset that published schedules have, as many timesteps as levels would end beyond the last level.
        found.set_timesteps(min(steps, self.levels - 1))
        return found


@dataclass(frozen=True, eq=False)
class SDDenoiser(UNetDenoiser):
    """Stable Diffusion 1.x and 2.x. `encoder` is another copy of the text encoder, which stays the base's."""

    LAYOUT = "stable-diffusion"

    @classmethod
    def _shared_encoder(cls, base: Base, device: torch.device) -> TextEncoder:
        return TextEncoder.of(base, device)

    def _predict(self, x: Tensor, t: Tensor, text: Conditioning, guidance: float) -> Tensor:
        found: Tensor = self.network(x, t, encoder_hidden_states=text.sequence).sample
        return found

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        tokens = self.pipe.tokenizer(
            list(prompts), padding="max_length", max_length=self.encoder.length, truncation=True, return_tensors="pt"
        )
        return Conditioning(self.pipe.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state)

    def hidden(self, prompts: Sequence[str]) -> Conditioning:
        assert isinstance(self.encoder, TextEncoder)
        return Conditioning(self.encoder.hidden(prompts))


@dataclass(frozen=True, eq=False)
class XLDenoiser(UNetDenoiser):
    """Stable Diffusion XL: two text encoders side by side, a pooled embedding, and the size of the picture as time ids."""

    LAYOUT = "stable-diffusion-xl"
    POOLED = "text_encoder_2.pooled"

    @cached_property
    def _time_ids(self) -> Tensor:
        width = self.pipe.text_encoder_2.config.projection_dim
        found: Tensor = self.pipe._get_add_time_ids(self.pixels, (0, 0), self.pixels, torch.float32, width)
        return found.to(self.device)

    def _predict(self, x: Tensor, t: Tensor, text: Conditioning, guidance: float) -> Tensor:
        added = {"text_embeds": text.pooled, "time_ids": self._time_ids.expand(len(x), -1)}
        found: Tensor = self.network(x, t, encoder_hidden_states=text.sequence, added_cond_kwargs=added).sample
        return found

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        with quiet_loading():
            sequence, _, pooled, _ = self.pipe.encode_prompt(
                list(prompts), device=self.device, do_classifier_free_guidance=False
            )
        return Conditioning(sequence, pooled)

    @cached_property
    @torch.no_grad()
    def unconditional(self) -> Conditioning:
        """Zeros instead of the empty prompt, where the base was trained so."""
        _, sequence, _, pooled = self.pipe.encode_prompt("", device=self.device, do_classifier_free_guidance=True)
        return Conditioning(sequence, pooled)


@dataclass(frozen=True, eq=False)
class FlowDenoiser(Denoiser):
    """What diffusion transformers share: rectified flow, on the levels that the pipeline itself would visit."""

    POOLED = "pooled"

    @property
    def network(self) -> Any:
        return self.pipe.transformer

    @property
    def levels(self) -> int:
        return int(self.pipe.scheduler.config.num_train_timesteps)

    @property
    @abstractmethod
    def _tokens(self) -> int:
        """Tokens that a picture is to the transformer, by which some schedules are shifted."""

    def _sigmas(self, steps: int) -> list[float] | None:
        """The noise levels of a walk before they are shifted, where the pipeline names them itself."""
        return None

    def sampler(self, steps: int) -> Any:
        """Euler's method on the pipeline's own timesteps."""
        return EulerSteps(self._times(min(steps, self.levels - 1)))

    def _times(self, steps: int) -> Tensor:
        with quiet_loading():
            from diffusers import FlowMatchEulerDiscreteScheduler
            from diffusers.pipelines.flux.pipeline_flux import calculate_shift

            schedule: Any = FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        config = schedule.config
        shift = {}
        if config.use_dynamic_shifting:
            known = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
            shift = {"mu": calculate_shift(self._tokens, *known)}
        sigmas = self._sigmas(steps)
        schedule.set_timesteps(steps, sigmas=sigmas, **shift)
        found: Tensor = schedule.timesteps
        return found.float()

    @cached_property
    def _levels(self) -> Tensor:
        return self._times(self.levels).flip(0)

    def time(self, level: Tensor) -> Tensor:
        return self._levels[level].to(self.device)

    def add_noise(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        share = (t / 1000).view(-1, 1, 1, 1)
        return (1 - share) * clean + share * noise

    def goal(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - clean

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        with quiet_loading():
            return Conditioning(*self._encode_prompt({"prompt": list(prompts), "device": self.device}))

    @abstractmethod
    def _encode_prompt(self, asked: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The sequence and the pooled embeddings of prompts, by the pipeline."""


@dataclass(frozen=True, eq=False)
class SD3Denoiser(FlowDenoiser):
    """Stable Diffusion 3 and 3.5."""

    LAYOUT = "stable-diffusion-3"

    @property
    def _tokens(self) -> int:
        return int((self.shape[1] // self.network.config.patch_size) ** 2)

    def _predict(self, x: Tensor, t: Tensor, text: Conditioning, guidance: float) -> Tensor:
        found: Tensor = self.network(
            hidden_states=x, timestep=t, encoder_hidden_states=text.sequence, pooled_projections=text.pooled
        ).sample
        return found

    def _encode_prompt(self, asked: dict[str, Any]) -> tuple[Tensor, Tensor]:
        sequence, _, pooled, _ = self.pipe.encode_prompt(
            **asked, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, **self._length_argument
        )
        return sequence, pooled


@dataclass(frozen=True, eq=False)
class FluxDenoiser(FlowDenoiser):
    """FLUX.1: latents packed two by two into tokens, and guidance as an input where the base was distilled for it."""

    LAYOUT = "flux"

    @property
    def shape(self) -> tuple[int, int, int]:
        side = 2 * (self._side(self.pipe.default_sample_size) // 2)
        return self.latent_channels, side, side

    @property
    def latent_channels(self) -> int:
        return int(self.network.config.in_channels) // 4

    @property
    def _tokens(self) -> int:
        return (self.shape[1] // 2) ** 2

    def _sigmas(self, steps: int) -> list[float]:
        return torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()

    @cached_property
    def _picture_ids(self) -> Tensor:
        _, height, width = self.shape
        found: Tensor = self.pipe._prepare_latent_image_ids(1, height // 2, width // 2, self.device, torch.float32)
        return found

    def _predict(self, x: Tensor, t: Tensor, text: Conditioning, guidance: float) -> Tensor:
        told = torch.full((len(x),), guidance, device=self.device) if self.network.config.guidance_embeds else None
        found: Tensor = self.network(
            hidden_states=self.pipe._pack_latents(x, *x.shape),
            timestep=t / 1000,
            guidance=told,
            pooled_projections=text.pooled,
            encoder_hidden_states=text.sequence,
            txt_ids=torch.zeros(text.sequence.shape[1], 3, device=self.device),
            img_ids=self._picture_ids,
        ).sample
        return self._unpacked(found)

    def _unpacked(self, latents: Tensor) -> Tensor:
        found: Tensor = self.pipe._unpack_latents(latents, *self.pixels, self.pipe.vae_scale_factor)
        return found

    def guided(self, x: Tensor, t: Tensor, text: Conditioning, guidance: float) -> Tensor:
        """One pass, as the pipeline has it: guidance is an input, or was distilled away."""
        return self(x, t, text, guidance)

    def _encode_prompt(self, asked: dict[str, Any]) -> tuple[Tensor, Tensor]:
        sequence, pooled, _ = self.pipe.encode_prompt(**asked, prompt_2=None, **self._length_argument)
        return sequence, pooled

    def drawn(
        self, prompts: Sequence[str], steps: int, guidance: float, generators: Sequence[torch.Generator]
    ) -> Tensor:
        return self._unpacked(super().drawn(prompts, steps, guidance, generators))


@dataclass(frozen=True)
class EulerSteps:
    """Steps along a straight path from noise (t = 1000) to a picture (t = 0)."""

    timesteps: Tensor
    init_noise_sigma: float = 1.0

    def step(self, prediction: Tensor, t: float, x: Tensor) -> Any:
        """x at the next timestep, as diffusers' schedulers return it: `.prev_sample`."""
        following = self.timesteps[self.timesteps < t]
        after = float(following[0]) if len(following) else 0.0
        return SimpleNamespace(prev_sample=x + (after - t) / 1000 * prediction)


_DENOISERS: Mapping[str, type[Denoiser]] = {
    kind.LAYOUT: kind for kind in (SDDenoiser, XLDenoiser, SD3Denoiser, FluxDenoiser)
}
TRAINABLE = tuple(_DENOISERS)
"""The layouts of bases on which solvers can train."""


def unserved(layout: Layout, known: Sequence[str] = TRAINABLE) -> str | None:
    """Why nothing can be trained on bases of a layout that is not among the `known` ones; None where it can."""
    if layout.name in known:
        return None
    return (
        f"this solver trains, which it can on bases of the layouts {', '.join(known)}; this is a {layout.name} base: use "
        "`separable`, which serves every layout"
    )


@dataclass(frozen=True, eq=False)
class LoadedPipeline:
    """A pipeline as it was loaded, with which nobody computes; the text encoder and the pictures that its copies share."""

    pipe: Any
    versions: tuple[int, ...]
    encoder: TextEncoder | None
    pictures: dict[Any, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: type[Denoiser], base: Base, device: torch.device) -> LoadedPipeline:
        """A base's pipeline, read from its files."""
        pipe = _drawing_pipeline(base, device)
        for module in _modules(pipe):
            module.eval().requires_grad_(False)
        return cls(pipe, _versions(pipe), kind._shared_encoder(base, device))

    @property
    def is_unchanged(self) -> bool:
        """Whether nobody wrote into the weights, by PyTorch's own count of writes, which leaves out those by way of `.data`."""
        return _versions(self.pipe) == self.versions

    def working_copy(self) -> Any:
        """The same pipeline with modules, parameters, buffers, tokenizers and scheduler of its own, whose values lie in the same
        memory."""
        own = pipeline_beside(self.pipe)
        for name, part in self.pipe.components.items():
            if isinstance(part, nn.Module):
                shared: dict[int, Any] = {id(tensor): tensor.detach() for tensor in part.buffers()}
                shared.update((id(tensor), nn.Parameter(tensor.detach(), False)) for tensor in part.parameters())
                vars(own)[name] = copy.deepcopy(part, shared)
        return own


_pipelines: WeakKeyDictionary[Base, dict[str, LoadedPipeline]] = WeakKeyDictionary()
_loading = Lock()


def _loaded(kind: type[Denoiser], base: Base, device: torch.device) -> LoadedPipeline:
    """The pipeline that concepts of a base share, loaded for the first of them."""
    with _loading:
        by_device = _pipelines.setdefault(base, {})
        found = by_device.get(str(device))
        if found is None or not found.is_unchanged:
            found = by_device[str(device)] = LoadedPipeline.of(kind, base, device)
        return found


@contextmanager
def releasing(base: Base) -> Iterator[None]:
    """After the block, the models that were kept for further concepts of a base are let go."""
    try:
        yield
    finally:
        _pipelines.pop(base, None)


def _modules(pipe: Any) -> Iterator[nn.Module]:
    return (part for part in pipe.components.values() if isinstance(part, nn.Module))


def _versions(pipe: Any) -> tuple[int, ...]:
    """How often each weight and buffer of a pipeline was written into."""
    return tuple(
        tensor._version for module in _modules(pipe) for tensor in chain(module.parameters(), module.buffers())
    )


def _drawing_pipeline(base: Base, device: torch.device) -> Any:
    """A fresh pipeline that draws from prompts: models of one that edits pictures as well are put into its family's first one."""
    pipe = base.pipeline(device=str(device))
    if not base.layout.is_caught:
        return pipe
    import diffusers

    kind: Any = getattr(diffusers, base.layout.pipelines[0])
    if type(pipe) is not kind:
        wanted = inspect.signature(kind.__init__).parameters
        pipe = kind(**{name: part for name, part in pipe.components.items() if name in wanted})
        pipe.set_progress_bar_config(disable=True)
    return pipe
