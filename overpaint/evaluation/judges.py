"""Judges: who says what a picture shows. Four kinds, by a word that the command line takes:

- `cnn`: the small classifier that ships with the embedded base, trained on drawings alone;
- `clip` or `clip:FOLDER-or-ID`: a CLIP that compares pictures with sentences, the base's own or any of `transformers`;
- `classifier:FOLDER-or-ID`: any image classifier of `transformers`; a class is found by its label;
- `hook:MODULE:FUNCTION`: one's own. The function is called with the `PromptSet` and returns something with the attributes and
  methods of `Judge`; detectors of nudity or of celebrities are attached this way.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from overpaint.bases.base import Base
from overpaint.bases.loading import own_torch_settings, quiet_loading
from overpaint.bases.safetensors_file import tensor_digest
from overpaint.core.atomic import write_over
from overpaint.core.encoding import combined_digest
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.evaluation.images import Pixels
from overpaint.evaluation.prompts import PromptSet

PICTURES_AT_ONCE = 256
"""Pixels judged at once."""


@runtime_checkable
class Judge(Protocol):
    """What every judge offers."""

    @property
    def name(self) -> str:
        """Which judge it is, weights included."""
        ...

    @property
    def heads(self) -> Mapping[str, tuple[str, ...]]:
        """The classes that it distinguishes, by head."""
        ...

    def probabilities(self, pictures: Pixels, head: str) -> NDArray[np.float32]:
        """How likely each class of a head is in each picture (uint8 [n, h, w, 3]): float32 [n, classes]."""
        ...

    def features(self, pictures: Pixels) -> NDArray[np.float32]:
        """The space in which distances between sets of pictures are measured: float32 [n, d]."""
        ...


NetworkT = TypeVar("NetworkT", bound="JudgeNetwork")


class JudgeNetwork(nn.Module):
    """The judge that ships with an embedded base: a small convolutional classifier for object, style and background, trained
    on the drawings alone.

    Pictures [n, 3, 64, 64] in [-1, 1] become logits by head; `classes` names each head's outputs in order.
    """

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
        """Logits [n, classes] by head."""
        features = self.features(pictures)
        return {name: head(features) for name, head in self.heads.items()}

    def save(self, folder: Path) -> None:
        """Write `judge.safetensors` and `judge.json` into a folder that is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        write_over(folder / "judge.safetensors", save(state))
        write_over(folder / "judge.json", json.dumps(self.classes, indent=1).encode())

    @classmethod
    def load(cls: type[NetworkT], folder: Path) -> NetworkT:
        """Read what `save` wrote; raises FileNotFoundError when the folder has no judge."""
        classes = {k: tuple(v) for k, v in json.loads((folder / "judge.json").read_text("utf-8")).items()}
        judge = cls(classes)
        state = {
            k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / "judge.safetensors").items()
        }
        judge.load_state_dict(state)
        return judge.eval()


@own_torch_settings()
def open_judge(spec: str, base: Base, prompt_set: PromptSet, device: torch.device) -> Judge:
    """The judge of a word (see this module); the empty word means the base's own `cnn`.

    Raises NotFound when the base has no such judge, OverpaintError for a word, a model or a hook that is none.
    """
    kind, _, place = spec.partition(":")
    if kind in ("", "cnn") and not place:
        return EmbeddedJudge(base, device)
    if kind == "clip":
        return ZeroShot(place or _own_clip(base), prompt_set, device)
    if kind == "classifier" and place:
        return Classifier(place, prompt_set, device)
    if kind == "hook" and ":" in place:
        return _hooked(place, prompt_set)
    raise OverpaintError(
        f"{spec!r} names no judge; use cnn, clip, clip:FOLDER-or-ID, classifier:FOLDER-or-ID or hook:MODULE:FUNCTION"
    )


@own_torch_settings()
def load_judge(folder: Path) -> JudgeNetwork:
    """The judge in a base's folder, in `judge/`.

    Raises NotFound when the base has none: only the embedded base ships with one. OverpaintError when it is damaged.
    """
    place = folder / "judge"
    if missing := [name for name in ("judge.json", "judge.safetensors") if not (place / name).is_file()]:
        raise NotFound(
            f"no judge in {folder}: {' and '.join(missing)} not found under judge/. Only the embedded base has "
            "a judge; for another base name one with --judge, such as clip:openai/clip-vit-base-patch32"
        )
    try:
        return JudgeNetwork.load(place)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise OverpaintError(f"the judge in {place} cannot be used ({reason}); get the base again") from error


class EmbeddedJudge:
    """The classifier in a base's own `judge/` folder. Raises NotFound when it has none."""

    def __init__(self, base: Base, device: torch.device) -> None:
        self._model = load_judge(base.path).to(device)
        self._device = device
        self.heads = dict(self._model.classes)
        self.name = f"cnn {_digest(self._model)}"

    def probabilities(self, pictures: Pixels, head: str) -> NDArray[np.float32]:
        return _in_batches(lambda part: self._model(part)[head].softmax(1), self._pixels(pictures), self._device)

    def features(self, pictures: Pixels) -> NDArray[np.float32]:
        return _in_batches(self._model.features, self._pixels(pictures), self._device)

    def _pixels(self, pictures: Pixels) -> Tensor:
        if pictures.dtype != np.uint8 or pictures.shape[1:] != (64, 64, 3):
            raise OverpaintError(
                f"the embedded judge reads uint8 pictures [n, 64, 64, 3]; got {pictures.dtype} {pictures.shape}"
            )
        return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float() / 127.5 - 1


class ZeroShot:
    """A CLIP: the class whose sentences a picture is most like. Sentences of one class are averaged as unit vectors."""

    def __init__(self, place: str | Path, prompt_set: PromptSet, device: torch.device) -> None:
        self._model, self._processor = _load("AutoModelForZeroShotImageClassification", place)
        self._tokenizer = _load_tokenizer(place)
        self._model.to(device)
        self._device = device
        self.heads = {head: prompt_set.names(head) for head in prompt_set.classes}
        self.name = f"clip {_digest(self._model)}"
        self._texts = {
            head: self._encoded([prompt_set.labels(head, n) for n in self.heads[head]]) for head in self.heads
        }

    @own_torch_settings()
    def probabilities(self, pictures: Pixels, head: str) -> NDArray[np.float32]:
        seen = torch.from_numpy(self.features(pictures)).to(self._device)
        seen = seen / seen.norm(dim=1, keepdim=True)
        scale = self._model.logit_scale.detach().exp()
        shares: NDArray[np.float32] = (scale * seen @ self._texts[head].T).softmax(1).cpu().numpy()
        return shares

    def features(self, pictures: Pixels) -> NDArray[np.float32]:
        encode = self._model.get_image_features
        return _in_batches(
            lambda p: _pooled(encode(pixel_values=p)), _processed(self._processor, pictures), self._device
        )

    @torch.no_grad()
    def _encoded(self, labels: list[list[str]]) -> Tensor:
        rows = []
        for sentences in labels:
            ids = self._tokenizer(sentences, padding="max_length", truncation=True, return_tensors="pt").to(
                self._device
            )
            embeddings = _pooled(self._model.get_text_features(**ids))
            rows.append((embeddings / embeddings.norm(dim=1, keepdim=True)).mean(0))
        texts = torch.stack(rows)
        unit: Tensor = texts / texts.norm(dim=1, keepdim=True)
        return unit


class Classifier:
    """An image classifier of `transformers`. A class is the labels that have one of its words; others are left out.

    Raises NotFound when no class of the prompt set has a label.
    """

    def __init__(self, place: str | Path, prompt_set: PromptSet, device: torch.device) -> None:
        self._model, self._processor = _load("AutoModelForImageClassification", place)
        self._model.to(device)
        self._device = device
        labels = {int(i): _words(label) for i, label in self._model.config.id2label.items()}
        self._columns: dict[str, dict[str, list[int]]] = {}
        for head, classes in prompt_set.classes.items():
            wanted = {name: {word.casefold() for word in (name, *words)} for name, words in classes.items()}
            indices = {n: [i for i, label in labels.items() if label & words] for n, words in wanted.items()}
            self._columns[head] = {name: columns for name, columns in indices.items() if columns}
        self.heads = {head: tuple(indices) for head, indices in self._columns.items()}
        self.name = f"classifier {_digest(self._model)}"
        if not any(self.heads.values()):
            some = ", ".join(sorted(self._model.config.id2label.values())[:5])
            raise NotFound(f"the classifier {place} has no label for any concept here (it has: {some}, ...)")

    def probabilities(self, pictures: Pixels, head: str) -> NDArray[np.float32]:
        every = _in_batches(lambda p: self._model(pixel_values=p).logits.softmax(1), self._read(pictures), self._device)
        columns = self._columns[head].values()
        return np.stack([every[:, chosen].sum(1) for chosen in columns], 1)

    def features(self, pictures: Pixels) -> NDArray[np.float32]:
        return _in_batches(lambda p: self._model(pixel_values=p).logits, self._read(pictures), self._device)

    def _read(self, pictures: Pixels) -> Tensor:
        return _processed(self._processor, pictures)


@own_torch_settings()
@torch.no_grad()
def _in_batches(compute: Any, values: Tensor, device: torch.device) -> NDArray[np.float32]:
    outputs = [compute(part.to(device)).float().cpu() for part in values.split(PICTURES_AT_ONCE)]
    joined: NDArray[np.float32] = torch.cat(outputs).numpy()
    return joined


def _load(kind: str, place: str | Path) -> tuple[Any, Any]:
    """A model of `transformers` and what prepares pictures for it."""
    with quiet_loading():
        import transformers

        try:
            model = getattr(transformers, kind).from_pretrained(place, dtype=torch.float32)
            processor = transformers.AutoImageProcessor.from_pretrained(place)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise OverpaintError(f"cannot load the judge {place}: {reason}") from error
    return model.eval(), processor


def _load_tokenizer(place: str | Path) -> Any:
    with quiet_loading():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(place)


def _processed(processor: Any, pictures: Pixels) -> Tensor:
    pixels: Tensor = processor([Image.fromarray(each) for each in pictures], return_tensors="pt")["pixel_values"]
    return pixels


def _pooled(output: Any) -> Tensor:
    """Features as older and newer releases of `transformers` hand them out."""
    embeddings: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return embeddings


def _words(label: str) -> set[str]:
    return {word.strip().casefold().replace("_", " ") for word in label.split(",")}


def _own_clip(base: Base) -> Path:
    place = base.path / "clip"
    if not (place / "config.json").is_file():
        raise NotFound(
            f"the base at {base.path} has no clip/ of its own; name one, such as clip:openai/clip-vit-base-patch32"
        )
    return place


def _hooked(place: str, prompt_set: PromptSet) -> Judge:
    module, _, name = place.partition(":")
    try:
        judge: Any = getattr(importlib.import_module(module), name)(prompt_set)
    except (ImportError, AttributeError) as error:
        raise OverpaintError(f"the judge hook:{place} cannot be loaded: {error}") from error
    if not isinstance(judge, Judge):
        raise OverpaintError(
            f"hook:{place} gave a {type(judge).__name__}; a judge has name, heads, probabilities, features"
        )
    return judge


def _digest(model: Any) -> str:
    """The first digits of the digest over a judge's weights."""
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    return combined_digest({name: tensor_digest(name, tensor.cpu()) for name, tensor in state.items()})[:12]
