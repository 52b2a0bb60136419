"""A dialect: how one family of tools spells layers and what the tensors in its files mean.

A key is a module's name and an ending. The ending says what role a tensor has in the change of one of the module's
parameters; the name is looked up among those the dialect gives the base's own modules. A file is of the dialect that
explains most of its keys.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from overpaint.bases.base import Base
from overpaint.errors import OverpaintError

Role = Literal["down", "up", "mid", "alpha", "difference", "value"]
Endings = Mapping[str, tuple[Role, str]]
"""What a key's ending means: the tensor's role, and the attribute of the module that it is about."""


class ForeignFile(OverpaintError):
    """A file of another tool that cannot be imported: unknown, unsafe, for another base, or of a kind no patch can hold."""


@dataclass(frozen=True)
class Dialect:
    """One dialect: its name, what its endings mean, and by which names it knows a base's modules.

    `spelled` gives canonical module by spelled name.
    """

    name: str
    endings: Endings
    spelled: Callable[[Base], Mapping[str, str]]

    def read(self, base: Base, keys: Collection[str]) -> Reading:
        """What the keys of a file mean in this dialect."""
        modules, endings = self.spelled(base), sorted(self.endings, key=len, reverse=True)
        parts: dict[str, dict[Role, str]] = {}
        unmatched = []
        for key in keys:
            ending = next((each for each in endings if key.endswith(each)), None)
            module = modules.get(key.removesuffix(ending)) if ending else None
            if ending is None or module is None:
                unmatched.append(key)
                continue
            role, attribute = self.endings[ending]
            roles = parts.setdefault(f"{module}.{attribute}", {})
            if role in roles:
                raise ForeignFile(f"{roles[role]} and {key} are about the same layer; take away the one not meant")
            roles[role] = key
        return Reading(self, parts, tuple(unmatched), len(keys) - len(unmatched))


@dataclass(frozen=True)
class Reading:
    """A file's keys explained: by canonical tensor name, the key in each role; and the keys left over."""

    dialect: Dialect
    parts: Mapping[str, Mapping[Role, str]] = field(repr=False)
    unmatched: tuple[str, ...]
    matched: int


UNREAD: Mapping[str, tuple[str, ...]] = {
    "DoRA": (
        "dora_scale",
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
        "lora_magnitude_vector.default.weight",
    ),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "OFT or BOFT": ("oft_blocks", "oft_diag"),
    "OFT": ("oft_r", "oft_s", "oft_R.weight"),
    "BOFT": ("boft_R", "boft_s"),
    "GLoRA": ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
    "IA3": ("on_input", "ia3_l"),
    "VeRA": ("vera_lambda_b", "vera_lambda_d"),
    "AdaLoRA": ("lora_E", "ranknum"),
    "FourierFT": ("fourierft_spectrum",),
    "HRA": ("hra_u",),
    "ComfyUI's set_weight": ("set_weight",),
    "ComfyUI's reshape_weight": ("reshape_weight",),
}
"""What is known and yet not read, by what its keys end in."""

_ALGORITHMS = {f".{ending}": algorithm for algorithm, endings in UNREAD.items() for ending in endings}
_UNREAD_ENDINGS = tuple(_ALGORITHMS)


def detect(dialects: Sequence[Dialect], base: Base, keys: Collection[str]) -> Reading:
    """The reading that explains most keys; the earlier dialect of two that explain as many.

    Raises ForeignFile when none explains any, or for an algorithm whose change is not read.
    """
    for key in keys:
        if key.endswith(_UNREAD_ENDINGS):
            algorithm = next(name for ending, name in _ALGORITHMS.items() if key.endswith(ending))
            raise ForeignFile(
                f"{_short(key)} is a tensor as {algorithm} names them, and {algorithm} is not read; merge the file into a "
                "checkpoint with the tool it comes from, and import the checkpoint"
            )
    best = max((dialect.read(base, keys) for dialect in dialects), key=lambda reading: reading.matched)
    if not best.matched:
        known = ", ".join(dialect.name for dialect in dialects)
        example = f", such as {_short(min(keys))}" if keys else ""
        raise ForeignFile(
            f"none of its {len(keys)} keys{example}, names a layer of the base at {base.path} in any dialect ({known}); it may "
            "be for another architecture"
        )
    return best


def _short(key: str) -> str:
    return repr(key if len(key) <= 100 else f"{key[:80]}...")
