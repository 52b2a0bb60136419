"""Prompts to keep: what a base must go on understanding as it does, whatever is erased from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from overpaint.errors import NotFound, OverpaintError
from overpaint.registry import models
from overpaint.registry.names import checked_note, quoted
from overpaint.registry.queries import find
from overpaint.registry.shelf import Shelf

LONGEST_PROMPT = 1000


@dataclass(frozen=True)
class KeptRecord:
    """A prompt to keep, and who asked for that, and when."""

    prompt: str
    who: str
    at: datetime


class Kept(Shelf):
    """Prompts to keep, by base. They are part of what a patch is solved for, and named in its provenance."""

    def keep_prompts(self, base: str, prompts: Iterable[str], *, who: str) -> int:
        """Keep prompts on a base: all of them, or none; returns how many are new.

        Raises NotFound for an unknown base, OverpaintError for a prompt that is empty, too long, or does not print.
        """
        wanted = list(dict.fromkeys(_checked(prompt) for prompt in prompts))
        checked_note(who, "the name of who did it")
        with self._database.writing() as session:
            row = find(session, models.Base, base)
            known = {kept.prompt for kept in _of(session, row)}
            new = [prompt for prompt in wanted if prompt not in known]
            session.add_all(models.KeptPrompt(base_id=row.id, prompt=prompt, who=who) for prompt in new)
        return len(new)

    def forget_prompts(self, base: str, prompts: Iterable[str] | None = None) -> int:
        """No longer keep some prompts, or any (None): all of them, or none; returns how many there were.

        Raises NotFound for an unknown base or a prompt that is not kept.
        """
        with self._database.writing() as session:
            row = find(session, models.Base, base)
            kept = {each.prompt: each for each in _of(session, row)}
            leaving = list(kept) if prompts is None else list(dict.fromkeys(prompt.strip() for prompt in prompts))
            for prompt in leaving:
                if prompt not in kept:
                    raise NotFound(
                        f"the prompt {quoted(prompt)} is not kept on {row.name!r}; see `overpaint base keep {row.name}`"
                    )
                session.delete(kept[prompt])
        return len(leaving)

    def kept_prompts(self, base: str) -> list[KeptRecord]:
        """The prompts that are kept on a base, in alphabetical order. Raises NotFound."""
        with self._database.reading() as session:
            found = _of(session, find(session, models.Base, base))
            return [KeptRecord(row.prompt, row.who, row.at) for row in found]


def _of(session: Session, base: models.Base) -> list[models.KeptPrompt]:
    rows = session.scalars(select(models.KeptPrompt).where(models.KeptPrompt.base_id == base.id))
    # By code point, which databases do not agree on.
    return sorted(rows, key=lambda row: row.prompt)


def _checked(prompt: str) -> str:
    text = checked_note(prompt, "a prompt").strip()
    if not text or "\n" in text:
        raise OverpaintError(f"a prompt to keep is one line with something in it; got {quoted(prompt)}")
    if len(text) > LONGEST_PROMPT:
        raise OverpaintError(
            f"a prompt to keep has at most {LONGEST_PROMPT} characters; {quoted(text)} has {len(text)}"
        )
    return text
