"""What can be erased."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from overpaint.errors import OverpaintError

KINDS = ("object", "style", "person", "unsafe")


@dataclass(frozen=True)
class Concept:
    """A concept: a name, what kind of thing it is, the words that call it up, and what it should become.

    `synonyms` are further nouns for the same thing; erasing covers the name and all of them. `anchor` is the word (or
    phrase) that replaces the concept; empty means nothing. Raises OverpaintError on an empty name, an unknown kind or
    an anchor that is the concept itself.
    """

    name: str
    kind: str = "object"
    synonyms: tuple[str, ...] = ()
    anchor: str = ""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise OverpaintError("a concept needs a name; got an empty one")
        if len(self.name) > 400:
            raise OverpaintError(f"a concept's name has at most 400 characters; this one has {len(self.name)}")
        if self.kind not in KINDS:
            raise OverpaintError(f"unknown kind of concept {self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.anchor and self.anchor.casefold() in {word.casefold() for word in self.words}:
            raise OverpaintError(
                f"the anchor of {self.name!r} is the concept itself; name something else, or leave it empty"
            )

    @property
    def words(self) -> tuple[str, ...]:
        """The name and the synonyms, each once."""
        return tuple(dict.fromkeys((self.name, *self.synonyms)))

    def as_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back."""
        return {**asdict(self), "synonyms": list(self.synonyms)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Concept:
        return cls(**{**data, "synonyms": tuple(data.get("synonyms", ()))})
