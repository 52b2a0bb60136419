"""What can be erased, and the concepts that a patch's manifest lists."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from overpaint.core.errors import OverpaintError
from overpaint.core.names import checked_texts, shown

KINDS = ("object", "style", "person", "unsafe")
HOLE = "{}"
"""Where a word stands in a sentence."""
_PLAIN: Mapping[str, Any] = {"kind": "object", "synonyms": [], "anchor": ""}
_LETTER = re.compile(r"\w")


@dataclass(frozen=True)
class Concept:
    """A concept: a name, what kind of thing it is, the words that call it up, and what it should become.

    `synonyms` are further nouns for the same thing; erasing covers the name and all of them. `anchor` is the word (or
    phrase) that replaces the concept; empty means nothing. `prompts` are sentences in which the concept occurs beside those
    that every concept is asked in; each names one of the words, or has `{}` where any of them may stand. Raises
    OverpaintError on an empty name, an unknown kind, an anchor that is the concept itself or a prompt without the concept.
    """

    name: str
    kind: str = "object"
    synonyms: tuple[str, ...] = ()
    anchor: str = ""
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("synonyms", "prompts"):
            object.__setattr__(self, field, checked_texts(getattr(self, field), f"the {field} of a concept"))
        for text in (self.name, self.kind, self.anchor):
            if not isinstance(text, str):
                raise OverpaintError(f"the name, the kind and the anchor of a concept are texts; got {shown(text)}")
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
        for prompt in self.prompts:
            phrases_in(prompt, self.words)

    @property
    def words(self) -> tuple[str, ...]:
        """The name and the synonyms, each once."""
        return tuple(dict.fromkeys((self.name, *self.synonyms)))

    @property
    def phrases(self) -> tuple[tuple[str, str], ...]:
        """The prompts as (sentence with `{}`, word that stands there); one that has `{}` itself, with every word."""
        return tuple(pair for prompt in self.prompts for pair in phrases_in(prompt, self.words))

    def as_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back. Without prompts it has no such key: digests are over it."""
        fields = {"name": self.name, "kind": self.kind, "synonyms": list(self.synonyms), "anchor": self.anchor}
        return {**fields, "prompts": list(self.prompts)} if self.prompts else fields

    def brief(self) -> dict[str, Any]:
        """The concept as a universe lists it: its name, and what differs from a plain object; `from_json` reads it back.

        In full, the universe of two hundred concepts would weigh more than the patch.
        """
        return {key: value for key, value in self.as_json().items() if value != _PLAIN.get(key)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Concept:
        """The concept that a manifest or a row describes."""
        return cls(**{**data, "synonyms": tuple(data.get("synonyms", ())), "prompts": tuple(data.get("prompts", ()))})


def universe_of(manifest: Mapping[str, Any], step: str = "") -> list[dict[str, Any]]:
    """All concepts that a patch was solved for, its own first, each in full as `Concept.as_json`.

    With a `step`, those of a later step that the solver's entry has, such as `decoupled`.
    """
    entry = manifest["solver"].get(step) if step else manifest["solver"]
    listed = entry.get("universe") if isinstance(entry, dict) else None
    items = listed if isinstance(listed, list) else []
    return [manifest["concept"], *({**_PLAIN, **item} for item in items if isinstance(item, dict))]


def phrases_in(prompt: str, words: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """A prompt as pairs of a sentence with `{}` and the word that stands there.

    Of several words that occur the longest is meant, and of several places the first. Raises OverpaintError for a prompt
    that has none of the words, or other braces than one `{}`.
    """
    if HOLE in prompt and not set("{}") & set(prompt.replace(HOLE, "", 1)):
        return tuple((prompt, word) for word in words)
    if "{" in prompt or "}" in prompt:
        raise OverpaintError(
            f"the prompt {prompt!r} has braces; only one {HOLE} is understood, where the concept stands"
        )
    for word in sorted(words, key=len, reverse=True):
        if place := _place_of(word, prompt):
            start, end = place
            return ((prompt[:start] + HOLE + prompt[end:], prompt[start:end]),)
    raise OverpaintError(
        f"the prompt {prompt!r} does not name {words[0]!r}; use one of its words ({', '.join(words)}), or {HOLE} for any"
    )


def _place_of(word: str, prompt: str) -> tuple[int, int] | None:
    """Start and end of the first place where a word stands by itself, in upper or lower case."""
    if not (word.isascii() and prompt.isascii()):
        match = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)
        return match.span() if match else None
    # The same without an expression for each word: compiling those of ten thousand concepts takes seconds.
    lower, text, start = word.lower(), prompt.lower(), -1
    while (start := text.find(lower, start + 1)) >= 0:
        end = start + len(word)
        if not _LETTER.match(text[start - 1 : start]) and not _LETTER.match(text[end : end + 1]):
            return start, end
    return None
