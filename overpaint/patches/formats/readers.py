"""What each tool reads: the formats that it knows, and the layers that it passes over without an error.

Facts about the tools' own loaders: A1111 1.10, sd-scripts 48d368f, ComfyUI 17358c8, diffusers 0.42. A tool that passes over
a layer leaves there what was to be erased, so an export says for whom it is whole, and is refused for whom it is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from overpaint.bases.base import Base
from overpaint.bases.key_mapping import single_file_of
from overpaint.core.errors import OverpaintError
from overpaint.patches.formats.dialects import ENCODERS, UNET


@dataclass(frozen=True)
class Reader:
    """A tool: its name, what it is called, the formats that it reads of a U-Net, the best first, and what it makes of them.

    Of diffusion transformers it reads those whose layout says so (`read_by`), and the diffusers format alone: kohya's names of
    text inputs load nothing in diffusers.
    `skips` has, by format, patterns of the canonical names that it passes over; encoders that the tool builds by OpenCLIP
    are called `open_clip` there. `note` is what else is to be known of it.
    """

    name: str
    about: str
    formats: tuple[str, ...]
    skips: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    note: str = ""

    def formats_of(self, base: Base) -> tuple[str, ...]:
        """The formats that it reads for a base's architecture."""
        if UNET in base.layout.components:
            return self.formats
        return ("diffusers",) if self.name in base.layout.read_by else ()

    def skipped(self, base: Base, format: str, names: Iterable[str]) -> list[str]:
        """The tensors of a file of a format that it reads, by canonical name, that it passes over."""
        encoders = open_clip_encoders(base)
        skipped = []
        for name in names:
            component, _, local = name.partition("/")
            known = f"open_clip/{local}" if component in encoders else name
            if any(fnmatchcase(known, pattern) for pattern in self.skips.get(format, ())):
                skipped.append(name)
        return skipped


_TOOLS = (
    Reader(
        "a1111",
        "A1111",
        ("kohya", "comfy-diff"),
        # It adds to the four matrices of an attention at once, and to the bias of the last alone.
        {"comfy-diff": ("open_clip/*.self_attn.[qkv]_proj.bias",)},
        "adds in the precision of the weights: in half precision off by about 1e-3 of the change",
    ),
    Reader(
        "kohya",
        "kohya's scripts",
        ("kohya",),
        # It looks inside of transformers, residual blocks and samplers.
        {"kohya": ("unet/conv_in.*", "unet/conv_out.*", "unet/time_embedding.*", "unet/add_embedding.*")},
    ),
    Reader("comfyui", "ComfyUI and Forge", ("kohya", "comfy-diff")),
    Reader("diffusers", "diffusers", ("diffusers", "kohya")),
)
READERS: Mapping[str, Reader] = {tool.name: tool for tool in _TOOLS}
"""The tools that an export can be for, by the name that `--for` has for each."""


def reader(name: str) -> Reader:
    """A tool by its name. Raises OverpaintError for one that is not known."""
    if name not in READERS:
        raise OverpaintError(f"unknown tool {name!r}; an export can be for {', '.join(READERS)}")
    return READERS[name]


def open_clip_encoders(base: Base) -> list[str]:
    """The text encoders that tools with the first publications' code build by OpenCLIP, with q, k and v in one matrix."""
    form = single_file_of(base.layout.single_files, base.names)
    return (
        []
        if form is None
        else [encoder for encoder in ENCODERS if (keys := form.mappings.get(encoder)) and keys.blocks]
    )
