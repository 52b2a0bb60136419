"""The modules of a base, by the names that tools give them: looked up, never guessed from a key's look."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from overpaint.bases.base import Base
from overpaint.patches.formats.ldm import ldm_modules

UNET = "unet"
ENCODERS = ("text_encoder", "text_encoder_2")
INNER = "text_model."
"""What text encoders' names began with, and canonical names still do."""


def modules_of(base: Base) -> Mapping[str, tuple[str, ...]]:
    """The local names of each component's modules, sorted, by component."""
    found: dict[str, set[str]] = {}
    for name in base.names:
        component, _, local = name.partition("/")
        found.setdefault(component, set()).add(local.rpartition(".")[0])
    return {component: tuple(sorted(modules)) for component, modules in found.items()}


def split(name: str) -> tuple[str, str]:
    """A canonical tensor name as module and attribute: `unet/conv_in.weight` is `unet/conv_in` and `weight`."""
    module, _, attribute = name.rpartition(".")
    return module, attribute


def unet_modules(base: Base) -> Iterator[tuple[str, str]]:
    """Canonical and local name of every module of the U-Net."""
    return ((f"{UNET}/{local}", local) for local in modules_of(base).get(UNET, ()))


def ldm_unet_modules(base: Base) -> Iterator[tuple[str, str]]:
    """Canonical name and old local name of every module of the U-Net that has one."""
    return ((f"{UNET}/{local}", name) for local, name in ldm_modules(modules_of(base).get(UNET, ())).items())


def encoder_modules(base: Base, encoder: str) -> Iterator[tuple[str, str]]:
    """Canonical and local name of every module of a text encoder: as it is, and without what newer libraries drop."""
    for local in modules_of(base).get(encoder, ()):
        yield f"{encoder}/{local}", local
        if local.startswith(INNER):
            yield f"{encoder}/{local}", local.removeprefix(INNER)


def lookup(spelled: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Canonical module by spelled name, from pairs (canonical, spelled). A name that could mean two modules is left out."""
    found: dict[str, str] = {}
    unsure = set()
    for module, name in spelled:
        if found.setdefault(name, module) != module:
            unsure.add(name)
    return {name: module for name, module in found.items() if name not in unsure}
