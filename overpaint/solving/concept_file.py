"""A file of concepts (YAML or JSON): what is to be erased, and how. Every mistake in it is named at once, with its place.

    defaults: {kind: style, solver: separable, settings: {rank: 4}}
    concepts:
      - watercolor
      - name: dog
        kind: object
        synonyms: [hound, puppy]
        prompts: [a hound at the hunt, "two {} at play"]
        anchor: cat

A concept is a name, or a mapping. What it does not say, `defaults` says; a list alone is a file without defaults.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from overpaint.concepts import KINDS, Concept, spoken_in
from overpaint.errors import NotFound, OverpaintError
from overpaint.registry.names import checked_note
from overpaint.solvers import solver_class
from overpaint.solvers.settings import configure, settable
from overpaint.solving.orders import Defaults, Order
from overpaint.solving.values import Reading, nearest, shape
from overpaint.solving.yaml_text import BadText, Items, Node, Pairs, Place, Text, parse

FILE_KEYS = ("defaults", "concepts")
DEFAULT_KEYS = ("kind", "anchor", "solver", "settings", "seed")
CONCEPT_KEYS = ("name", "kind", "synonyms", "prompts", "anchor", "images", "solver", "settings", "seed")
DESCRIPTION = {"kind", "synonyms", "prompts", "anchor"}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class BadConceptFile(OverpaintError):
    """A file of concepts with mistakes in it."""


def read_concepts(
    path: Path, *, solver: str | None = None, settings: Mapping[str, str] | None = None, seed: int | None = None
) -> tuple[Order, ...]:
    """The orders of a file, in its order; `solver`, `settings` and `seed` go before its defaults.

    Raises NotFound for a file that is not there, BadConceptFile for one that is not as it should be, and NotFound or
    BadSetting for a solver or settings that cannot go before its defaults.
    """
    try:
        root = parse(path.read_bytes())
    except BadText as error:
        raise BadConceptFile(f"{path}, {error}") from error
    except OSError as error:
        raise NotFound(f"{path} cannot be read ({error.strerror}); name a YAML or JSON file of concepts") from error
    reading = _Concepts(path)
    listed = reading.head(root)
    if not reading.mistakes:
        reading.defaults = reading.defaults.overridden(solver, settings or {}, seed)
        reading.defaults.order(Concept("any")).method()
    orders = reading.orders(listed)
    if reading.mistakes:
        raise BadConceptFile(reading.told(str(path)))
    return orders


class _Concepts(Reading):
    """A pass over a file of concepts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.defaults = Defaults()
        self.describe = False
        self.taken: dict[str, tuple[str, Place]] = {}

    def head(self, root: Node | None) -> Node | None:
        """Take the defaults, if any, and give the node that lists the concepts."""
        if not isinstance(root, Pairs):
            return root
        top = self.pairs(root, FILE_KEYS, "a file of concepts")
        if "defaults" in top:
            self.defaults = self.read_defaults(top["defaults"])
        return top.get("concepts")

    def orders(self, listed: Node | None) -> tuple[Order, ...]:
        """The order of every concept without a mistake."""
        if isinstance(listed, Items) and listed.items:
            return tuple(order for node in listed.items if (order := self.concept(node)) is not None)
        if not self.mistakes:
            at = listed.at if listed is not None else Place(1, 1)
            self.wrong(at, "no concept is listed; write `concepts:` and below it one line `- NAME` for each")
        return ()

    def read_defaults(self, node: Node) -> Defaults:
        """What counts for all concepts that do not say otherwise."""
        found = self.pairs(node, DEFAULT_KEYS, "defaults")
        self.describe = bool(DESCRIPTION & found.keys())
        solver, seed = self.solver(found.get("solver")), self.seed(found.get("seed"))
        chosen = Defaults().overridden(solver, self.settings(found.get("settings"), solver or Defaults.solver), seed)
        kind, anchor = self.kind(found.get("kind")), self.word(found.get("anchor"), "the anchor", may_be_empty=True)
        return Defaults(kind or Defaults.kind, anchor or "", chosen.solver, chosen.settings, chosen.seed)

    def concept(self, node: Node) -> Order | None:
        """The order of one entry; None where it has a mistake."""
        before = len(self.mistakes)
        found = {"name": node} if isinstance(node, Text) else self.pairs(node, CONCEPT_KEYS, "a concept")
        if "name" not in found:
            if len(self.mistakes) == before:
                self.wrong(node.at, "this concept has no name; add `name: ...`")
            return None
        name = self.word(found["name"], "the name of a concept")
        synonyms = self.words(found.get("synonyms"), "a synonym")
        if name is None:
            return None
        self.take([(name, found["name"].at), *synonyms])
        words = (name, *(word for word, _ in synonyms))
        anchor = self.anchor(found.get("anchor"), words, node.at)
        kind, prompts = self.kind(found.get("kind")), self.prompts(found.get("prompts"), words)
        solver, seed = self.solver(found.get("solver")), self.seed(found.get("seed"))
        method = solver or self.defaults.solver
        settings = self.settings(found.get("settings"), method) | self.images(found.get("images"), method)
        if len(self.mistakes) > before:
            return None
        concept = Concept(name, kind or self.defaults.kind, words[1:], anchor, prompts)
        order = self.defaults.order(concept, solver, settings, seed)
        self.takes(node.at, order.solver, order.settings)
        return replace(order, described=self.describe or bool(DESCRIPTION & found.keys()))

    def take(self, words: list[tuple[str, Place]]) -> None:
        """A word can call up one concept only: what erases one would have to leave the other alone."""
        owner = words[0][0]
        for word, at in words:
            first_owner, first = self.taken.setdefault(word.casefold(), (owner, at))
            if first is not at:
                same = first_owner.casefold() == owner.casefold()
                twice = "is listed twice" if same else f"is a word of {first_owner!r} already"
                self.wrong(at, f"{word!r} {twice} (line {first.line}); keep one of them")

    def anchor(self, node: Node | None, words: Iterable[str], at: Place) -> str:
        """What a concept becomes; empty for nothing."""
        found = self.defaults.anchor if node is None else self.word(node, "the anchor", may_be_empty=True) or ""
        if found.casefold() in {word.casefold() for word in words}:
            way = "name something else, or leave it empty"
            if node is None:
                way = 'say `anchor: ""` or another one here, because that of the defaults is meant for the others'
            self.wrong(at if node is None else node.at, f"the anchor {found!r} is the concept itself; {way}")
        return found

    def prompts(self, node: Node | None, words: tuple[str, ...]) -> tuple[str, ...]:
        """Sentences that name the concept, each once."""
        listed = node.items if isinstance(node, Items) else [] if node is None else [node]
        if node is not None and not listed:
            self.wrong(node.at, "the concept has no prompt; list sentences that name it, or leave `prompts` out")
        found = []
        for each in listed:
            if not isinstance(each, Text) or each.is_nothing or not each.value.strip():
                self.wrong(each.at, f"a prompt must be a sentence; got {shape(each)}")
                continue
            found.append(unicodedata.normalize("NFC", " ".join(each.value.split())))
            try:
                spoken_in(checked_note(found[-1], "a prompt"), words)
            except OverpaintError as error:
                self.wrong(each.at, str(error))
        return tuple(dict.fromkeys(found))

    def kind(self, node: Node | None) -> str | None:
        """A kind of concepts."""
        kind = self.word(node, "the kind of a concept")
        if node is not None and kind is not None and kind not in KINDS:
            self.wrong(node.at, f"unknown kind of concept {kind!r}{nearest(kind, KINDS)}; there are {', '.join(KINDS)}")
            return None
        return kind

    def solver(self, node: Node | None) -> str | None:
        """The name of a solver."""
        name = self.word(node, "a solver")
        if node is not None and name is not None:
            self.takes(node.at, name, {})
        return name

    def settings(self, node: Node | None, solver: str) -> dict[str, str]:
        """Settings of a solver, each checked by itself."""
        if node is None or not self.is_known(solver):
            return {}
        found: dict[str, str] = {}
        for key, value in self.pairs(node, None, "settings").items():
            if not isinstance(value, Text) or value.is_nothing:
                self.wrong(value.at, f"the setting {key!r} needs one value; got {shape(value)}")
            elif self.takes(value.at, solver, {key: value.value}):
                found[key] = value.value
        return found

    def images(self, node: Node | None, solver: str) -> dict[str, str]:
        """The setting that tells a solver where pictures of the concept lie; folders are relative to the file's own."""
        text = self.word(node, "a folder of pictures")
        if node is None or text is None or not self.is_known(solver):
            return {}
        folder = self.path.parent / Path(text).expanduser()
        if not folder.is_dir():
            self.wrong(node.at, f"there is no folder {folder}; name one that holds pictures of the concept")
        elif not any(file.suffix.lower() in PICTURES for file in folder.iterdir()):
            self.wrong(node.at, f"{folder} holds no picture ({', '.join(PICTURES)}); put some there")
        elif "images" not in settable(solver_class(solver)):
            self.wrong(node.at, f"the solver {solver!r} takes no pictures; leave `images` out, or choose another one")
        return {"images": str(folder)}

    def takes(self, at: Place, solver: str, settings: Mapping[str, str]) -> bool:
        """Whether there is such a solver and it takes these settings."""
        try:
            configure(solver_class(solver), settings)
        except OverpaintError as error:
            self.wrong(at, str(error))
            return False
        return True

    def is_known(self, solver: str) -> bool:
        """Whether there is such a solver; a mistake that was put down where it is named."""
        try:
            return solver_class(solver) is not None
        except OverpaintError:
            return False
