"""The texts in an export's header: what user interfaces read about a LoRA, and which patches are in it.

`ss_…` are kohya's, `sshs_…` A1111's, `modelspec.…` those of the Stability model metadata specification. All values are
texts, and nothing depends on when or where the file was written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from overpaint import __version__
from overpaint.bases.base import Base
from overpaint.bases.digests import canonical_json
from overpaint.patches.formats.modules import ENCODERS

KEY = "overpaint.export"
UNKNOWN = "0" * 64
"""Stands for the digest of the bytes that follow the header, until they are written."""
WIDTH_OF_2 = 1024
"""From this text width on, a base with one text encoder is a Stable Diffusion 2.x."""


@dataclass(frozen=True)
class About:
    """What an export is of: a title, each patch's id, concept and strength, and the day of the newest (YYYY-MM-DD), if known."""

    title: str
    patches: Sequence[tuple[str, str, float]] = ()
    day: str = ""


def header_of(base: Base, about: About, format: str, ranks: Sequence[int]) -> dict[str, str]:
    """The header of an export. `ranks` are those of the LoRA layers in it, none for a file of another kind."""
    version, architecture = _family(base)
    concepts = ", ".join(concept for _, concept, _ in about.patches)
    patches = [{"id": id, "concept": concept, "strength": strength} for id, concept, strength in about.patches]
    kind = "lora" if ranks else "weights"
    found = {
        "format": "pt",
        KEY: canonical_json({"base": base.fingerprint, "format": format, "patches": patches}).decode(),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/{kind}",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": about.title,
        "modelspec.description": f"Erases {concepts or 'nothing by name'}; written by Overpaint {__version__}",
        "modelspec.usage_hint": "Use at strength 1; at 0 what is erased comes back.",
        "modelspec.tags": "concept erasure",
        "modelspec.merged_from": ", ".join(id for id, _, _ in about.patches),
        "modelspec.hash_sha256": f"0x{UNKNOWN}",
        "sshs_model_hash": UNKNOWN,
        "ss_base_model_version": version,
        "ss_v2": str(version == "sd_v2"),
        "ss_output_name": about.title,
        **({"modelspec.date": about.day} if about.day else {}),
    }
    if ranks:
        dim = str(max(ranks))
        found |= {
            "ss_network_module": "networks.lora",
            "ss_network_dim": dim,
            "ss_network_alpha": dim,
            "ss_network_args": "{}",
        }
    return dict(sorted(found.items()))


def sealed(header: Mapping[str, str], digest: str) -> dict[str, str]:
    """A header with the digest of the bytes that follow it."""
    return {key: text.replace(UNKNOWN, digest) if text.endswith(UNKNOWN) else text for key, text in header.items()}


def _family(base: Base) -> tuple[str, str]:
    """What kohya's scripts and the model specification call the architecture."""
    if ENCODERS[1] in base.layout.components:
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    width = base.places[base.readers(ENCODERS[0])[0]].shape[-1]
    return ("sd_v2", "stable-diffusion-v2-768-v") if width >= WIDTH_OF_2 else ("sd_v1", "stable-diffusion-v1")
