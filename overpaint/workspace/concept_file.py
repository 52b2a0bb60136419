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

A text is first read as nodes that know their places. Nothing is resolved in them: `no`, `1e-4` and `2027-01-31` stay texts until
it is known what they mean. Of YAML, that is taken which a list of concepts needs: one document, no aliases (a few lines of them
can mean gigabytes) and no tags.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped]

from overpaint.core.concepts import KINDS, Concept, phrases_in
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.core.names import SEEDS, checked_name, checked_note, nearest, quoted, typed_path
from overpaint.solvers import solver_class
from overpaint.solvers.problem import configure, settable
from overpaint.workspace.planning import Defaults, SolveRequest

LARGEST = 16 << 20
"""Bytes of a file. Ten thousand concepts with all they can have take a tenth of it."""
DEEPEST = 8
"""How deeply lists and mappings may be nested; a file of concepts needs five."""
T = TypeVar("T")
_NOTHING = ("", "~", "null", "Null", "NULL")


class BadText(OverpaintError):
    """A text that is not the YAML that is taken here. The message begins with the place."""


@dataclass(frozen=True, order=True)
class TextPosition:
    """Line and column, both from 1."""

    line: int
    column: int

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}"

    @classmethod
    def of(cls, mark: Any) -> TextPosition:
        return cls(mark.line + 1, mark.column + 1)


@dataclass(frozen=True)
class Text:
    """A value. `plain` when it stands without quotation marks."""

    at: TextPosition
    value: str
    plain: bool = True

    @property
    def is_nothing(self) -> bool:
        """Whether this is how YAML and JSON write that there is no value."""
        return self.plain and self.value in _NOTHING


@dataclass(frozen=True)
class Items:
    """A list."""

    at: TextPosition
    items: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class Pairs:
    """A mapping. A key may be there twice; that is for the schema to say."""

    at: TextPosition
    pairs: list[tuple[Text, Node]] = field(default_factory=list)


Node = Text | Items | Pairs


def parse(raw: bytes) -> Node | None:
    """The one document of a text in UTF-8; None when there is nothing in it. Raises BadText."""
    if len(raw) > LARGEST:
        raise BadText(f"a file of concepts has at most {LARGEST >> 20} MiB; this one has {len(raw) >> 20}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise BadText(f"line {line}: byte {raw[error.start]:#x} is not UTF-8; save the file as UTF-8") from error
    if text.lstrip().startswith(("{", "[")):
        # JSON may be indented with tabs, YAML may not; within JSON's texts they are written as \t.
        text = text.replace("\t", " ")
    if hasattr(yaml, "CSafeLoader"):
        # Ten times as fast; what it does not take is read again by the other, whose errors say more.
        with suppress(yaml.YAMLError):
            return _document(yaml.parse(text, Loader=yaml.CSafeLoader))
    try:
        return _document(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = TextPosition(before.count("\n") + 1, len(before) - before.rfind("\n"))
        raise BadText(f"{place}: the character {chr(error.character)!r} cannot stand in a text; remove it") from error
    except yaml.MarkedYAMLError as error:
        raise BadText(_explained(text, error)) from error


def _explained(text: str, error: Any) -> str:
    mark = error.problem_mark or error.context_mark
    at = text[mark.index : mark.index + 1]
    if at == "\t":
        return f"{TextPosition.of(mark)}: a tab; YAML is indented with spaces"
    if "mapping values" in (error.problem or ""):
        return (
            f"{TextPosition.of(mark)}: a colon where none can be; put quotation marks around a text that contains ': '"
        )
    context = f" {error.context}" if error.context else ""
    return f"{TextPosition.of(mark)}: this is not YAML: {error.problem}{context}"


def _document(events: Iterator[Any]) -> Node | None:
    """Build nodes from the parser's events, without recursion, and stop at the first event that is not taken."""
    root: list[Node] = []
    opened: list[Items | Pairs] = []
    keys: list[Text | None] = []  # of each opened node, the key that waits for its value
    for event in events:
        _refuse(event, len(opened))
        if isinstance(event, yaml.DocumentStartEvent) and root:
            raise BadText(
                f"{TextPosition.of(event.start_mark)}: a second document begins; put all concepts into one list"
            )
        if isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
            opened.pop()
            keys.pop()
            continue
        node = _node(event)
        if node is None:
            continue
        _place(node, opened, keys, root)
        if not isinstance(node, Text):
            opened.append(node)
            keys.append(None)
    if not root or (isinstance(root[0], Text) and root[0].is_nothing):
        return None
    return root[0]


def _place(node: Node, opened: list[Items | Pairs], keys: list[Text | None], root: list[Node]) -> None:
    """Put a node where the events before it say that it belongs."""
    if not opened:
        root.append(node)
    elif isinstance(parent := opened[-1], Items):
        parent.items.append(node)
    elif (key := keys[-1]) is not None:
        parent.pairs.append((key, node))
        keys[-1] = None
    elif isinstance(node, Text):
        keys[-1] = node
    else:
        raise BadText(f"{node.at}: a key must be a word; got a list or a mapping")


def _node(event: Any) -> Node | None:
    if isinstance(event, yaml.ScalarEvent):
        place = TextPosition.of(event.start_mark)
        return Text(place, _whole(event.value, place), plain=not event.style)
    if isinstance(event, yaml.SequenceStartEvent):
        return Items(TextPosition.of(event.start_mark))
    return Pairs(TextPosition.of(event.start_mark)) if isinstance(event, yaml.MappingStartEvent) else None


def _refuse(event: Any, depth: int) -> None:
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
        mark = "*" if isinstance(event, yaml.AliasEvent) else "&"
        raise BadText(
            f"{TextPosition.of(event.start_mark)}: {mark}{event.anchor} is an alias or an anchor of YAML, which is not allowed; "
            "write the value out, or use quotation marks if it is a text"
        )
    if getattr(event, "tag", None) is not None:
        raise BadText(
            f"{TextPosition.of(event.start_mark)}: the tag {event.tag!r} is not taken here; write a plain value"
        )
    if depth > DEEPEST:
        raise BadText(f"{TextPosition.of(event.start_mark)}: lists and mappings are nested more than {DEEPEST} deep")


def _whole(text: str, place: TextPosition) -> str:
    """A text whose characters beyond 16 bits may be written as JSON does, in two halves."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise BadText(f"{place}: half of a character (\\ud800 to \\udfff); write the other half too") from error


SHOWN = 50
"""How many mistakes are shown."""


class NodeReader:
    """One pass over a file's nodes, and the mistakes found so far.

    Every method gives the value of one node: None (or nothing) where there is no node, or where it has a mistake.
    """

    def __init__(self) -> None:
        self.mistakes: list[tuple[TextPosition, str]] = []

    def wrong(self, at: TextPosition, text: str) -> None:
        """Put down a mistake."""
        self.mistakes.append((at, text))

    def message(self, file: str) -> str:
        """All mistakes as one message, in the order of the file."""
        lines = [f"  {place}: {text}" for place, text in sorted(self.mistakes)]
        more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        count = "a mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        return "\n".join([f"{file} has {count}, so nothing was stored:", *lines[:SHOWN], *more])

    def pairs(self, node: Node, keys: tuple[str, ...] | None, what: str) -> dict[str, Node]:
        """The values of a mapping by key; `keys` are those it may have, None for any."""
        if not isinstance(node, Pairs):
            named = f" ({', '.join(keys)})" if keys else ""
            self.wrong(node.at, f"{what} must be a mapping of names to values{named}; got {shape(node)}")
            return {}
        values: dict[str, Node] = {}
        for key, value in node.pairs:
            if keys is not None and key.value not in keys:
                had = ", ".join(keys)
                self.wrong(key.at, f"{what} has no {key.value!r}{nearest(key.value, keys)}; it can have {had}")
            elif key.value in values:
                self.wrong(key.at, f"{key.value!r} is there twice; keep one of them")
            else:
                values[key.value] = value
        return values

    def text(self, node: Node | None, what: str) -> str | None:
        """One value as it is written: a number, a day, a path, or what somebody else checks."""
        if node is None:
            return None
        if not isinstance(node, Text):
            self.wrong(node.at, f"{what} must be a text; got {shape(node)}")
            return None
        if node.is_nothing or not node.value.strip():
            quotes = f", in quotation marks if {node.value!r} is meant" if node.value.strip() else ""
            self.wrong(node.at, f"{what} is empty; write one{quotes}")
            return None
        return node.value

    def word(self, node: Node | None, what: str, *, may_be_empty: bool = False) -> str | None:
        """A word of a concept, in Unicode's composed form."""
        if may_be_empty and isinstance(node, Text) and (node.is_nothing or not node.value):
            return None
        text = self.text(node, what)
        return None if node is None or text is None else self.checked(node, checked_name, text.strip(), "concept")

    def note(self, node: Node | None, what: str) -> str:
        """Free text, which may be empty or of several lines."""
        if node is None or (isinstance(node, Text) and (node.is_nothing or not node.value.strip())):
            return ""
        text = self.text(node, what)
        return (text and self.checked(node, checked_note, text, what)) or ""

    def checked(self, node: Node, check: Callable[[str, str], T], text: str, what: str) -> T | None:
        """What a check makes of a node's text."""
        try:
            return check(text, what)
        except OverpaintError as error:
            self.wrong(node.at, str(error))
            return None

    def words(self, node: Node | None, what: str) -> list[tuple[str, TextPosition]]:
        """Words with their places, of a list or of a single word."""
        listed = node.items if isinstance(node, Items) else [] if node is None else [node]
        return [(word, each.at) for each in listed if (word := self.word(each, what)) is not None]

    def seed(self, node: Node | None) -> int | None:
        """A seed that a registry can keep."""
        text = self.text(node, "a seed")
        if node is None or text is None:
            return None
        if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) >= SEEDS:
            self.wrong(node.at, f"a seed is a whole number from 0 to {SEEDS - 1}; got {quoted(text)}")
            return None
        return int(text)


def shape(node: Node) -> str:
    """What a node is, in words."""
    if isinstance(node, Text):
        return "nothing" if node.is_nothing else f"{node.value!r}"
    return "a list" if isinstance(node, Items) else "a mapping"


FILE_KEYS = ("defaults", "concepts")
DEFAULT_KEYS = ("kind", "anchor", "solver", "settings", "seed")
CONCEPT_KEYS = ("name", "kind", "synonyms", "prompts", "anchor", "images", "solver", "settings", "seed")
DESCRIPTION = {"kind", "synonyms", "prompts", "anchor"}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class BadConceptFile(OverpaintError):
    """A file of concepts with mistakes in it."""


def read_concepts(
    path: Path, *, solver: str | None = None, settings: Mapping[str, str] | None = None, seed: int | None = None
) -> tuple[SolveRequest, ...]:
    """The requests of a file, in its order; `solver`, `settings` and `seed` go before its defaults.

    Raises NotFound for a file that is not there, BadConceptFile for one that is not as it should be, and NotFound or
    BadSetting for a solver or settings that cannot go before its defaults.
    """
    root = read_nodes(path, "concepts")
    reading = ConceptReader(path)
    listed = reading.head(root)
    if not reading.mistakes:
        reading.defaults = reading.defaults.overridden(solver, settings or {}, seed)
        reading.defaults.request(Concept("any")).configured()
    requests = reading.requests(listed)
    if reading.mistakes:
        raise BadConceptFile(reading.message(str(path)))
    return requests


def read_nodes(path: Path, what: str) -> Node | None:
    """The nodes of a file of `what`. Raises NotFound for one that cannot be read, BadConceptFile for what is not such YAML."""
    try:
        return parse(path.read_bytes())
    except BadText as error:
        raise BadConceptFile(f"{path}, {error}") from error
    except OSError as error:
        raise NotFound(f"{path} cannot be read ({error.strerror}); name a YAML or JSON file of {what}") from error


class ConceptReader(NodeReader):
    """A pass over a file of concepts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.defaults = Defaults()
        self.describe = False
        self.taken: dict[str, tuple[str, TextPosition]] = {}

    def head(self, root: Node | None) -> Node | None:
        """Take the defaults, if any, and give the node that lists the concepts."""
        if not isinstance(root, Pairs):
            return root
        top = self.pairs(root, FILE_KEYS, "a file of concepts")
        if "defaults" in top:
            self.defaults = self.read_defaults(top["defaults"])
        return top.get("concepts")

    def requests(self, listed: Node | None) -> tuple[SolveRequest, ...]:
        """The request for every concept without a mistake."""
        if isinstance(listed, Items) and listed.items:
            return tuple(request for node in listed.items if (request := self.concept(node)) is not None)
        if not self.mistakes:
            at = listed.at if listed is not None else TextPosition(1, 1)
            self.wrong(at, "no concept is listed; write `concepts:` and below it one line `- NAME` for each")
        return ()

    def read_defaults(self, node: Node) -> Defaults:
        """What counts for all concepts that do not say otherwise."""
        values = self.pairs(node, DEFAULT_KEYS, "defaults")
        self.describe = bool(DESCRIPTION & values.keys())
        solver, seed = self.solver(values.get("solver")), self.seed(values.get("seed"))
        chosen = Defaults().overridden(solver, self.settings(values.get("settings"), solver or Defaults.solver), seed)
        kind, anchor = self.kind(values.get("kind")), self.word(values.get("anchor"), "the anchor", may_be_empty=True)
        return Defaults(kind or Defaults.kind, anchor or "", chosen.solver, chosen.settings, chosen.seed)

    def concept(self, node: Node, others: tuple[str, ...] = (), *, once: bool = True) -> SolveRequest | None:
        """The request of one entry, which may have `others` of keys that somebody else reads; None where it has a mistake.

        With `once`, no other entry may have a word of it.
        """
        before = len(self.mistakes)
        values = {"name": node} if isinstance(node, Text) else self.pairs(node, (*CONCEPT_KEYS, *others), "a concept")
        if "name" not in values:
            if len(self.mistakes) == before:
                self.wrong(node.at, "this concept has no name; add `name: ...`")
            return None
        name = self.word(values["name"], "the name of a concept")
        synonyms = self.words(values.get("synonyms"), "a synonym")
        if name is None:
            return None
        if once:
            self.take([(name, values["name"].at), *synonyms])
        words = (name, *(word for word, _ in synonyms))
        anchor = self.anchor(values.get("anchor"), words, node.at)
        kind, prompts = self.kind(values.get("kind")), self.prompts(values.get("prompts"), words)
        solver, seed = self.solver(values.get("solver")), self.seed(values.get("seed"))
        effective = solver or self.defaults.solver
        settings = self.settings(values.get("settings"), effective) | self.images(values.get("images"), effective)
        if len(self.mistakes) > before:
            return None
        concept = Concept(name, kind or self.defaults.kind, words[1:], anchor, prompts)
        request = self.defaults.request(concept, solver, settings, seed)
        self.takes(node.at, request.solver, request.settings)
        return replace(request, is_bare_name=not self.describe and not DESCRIPTION & values.keys())

    def take(self, words: list[tuple[str, TextPosition]]) -> None:
        """A word can call up one concept only: what erases one would have to leave the other alone.

        The words of one concept may differ in capitals alone, which some text encoders tell apart.
        """
        owner = words[0][0]
        own: set[str] = set()
        listed = {word.casefold() for word, _ in words if word.casefold() in self.taken}
        for word, at in words:
            first_owner, first = self.taken.setdefault(word.casefold(), (owner, at))
            if first is not at and (word in own or word.casefold() in listed):
                same = first_owner.casefold() == owner.casefold()
                twice = "is listed twice" if same else f"is a word of {first_owner!r} already"
                self.wrong(at, f"{word!r} {twice} (line {first.line}); keep one of them")
            own.add(word)

    def anchor(self, node: Node | None, words: Iterable[str], at: TextPosition) -> str:
        """What a concept becomes; empty for nothing."""
        anchor = self.defaults.anchor if node is None else self.word(node, "the anchor", may_be_empty=True) or ""
        if anchor.casefold() in {word.casefold() for word in words}:
            way = "name something else, or leave it empty"
            if node is None:
                way = 'say `anchor: ""` or another one here, because that of the defaults is meant for the others'
            self.wrong(at if node is None else node.at, f"the anchor {anchor!r} is the concept itself; {way}")
        return anchor

    def prompts(self, node: Node | None, words: tuple[str, ...]) -> tuple[str, ...]:
        """Sentences that name the concept, each once."""
        listed = node.items if isinstance(node, Items) else [] if node is None else [node]
        if node is not None and not listed:
            self.wrong(node.at, "the concept has no prompt; list sentences that name it, or leave `prompts` out")
        prompts = []
        for each in listed:
            if not isinstance(each, Text) or each.is_nothing or not each.value.strip():
                self.wrong(each.at, f"a prompt must be a sentence; got {shape(each)}")
                continue
            prompts.append(unicodedata.normalize("NFC", " ".join(each.value.split())))
            try:
                phrases_in(checked_note(prompts[-1], "a prompt"), words)
            except OverpaintError as error:
                self.wrong(each.at, str(error))
        return tuple(dict.fromkeys(prompts))

    def kind(self, node: Node | None) -> str | None:
        """A kind of concepts."""
        kind = self.text(node, "the kind of a concept")
        if node is not None and kind is not None and kind not in KINDS:
            self.wrong(
                node.at, f"unknown kind of concept {quoted(kind)}{nearest(kind, KINDS)}; there are {', '.join(KINDS)}"
            )
            return None
        return kind

    def solver(self, node: Node | None) -> str | None:
        """The name of a solver."""
        name = self.text(node, "a solver")
        if node is not None and name is not None:
            self.takes(node.at, name, {})
        return name

    def settings(self, node: Node | None, solver: str) -> dict[str, str]:
        """Settings of a solver, each checked by itself."""
        if node is None or not self.is_known(solver):
            return {}
        texts: dict[str, str] = {}
        for key, value in self.pairs(node, None, "settings").items():
            if not isinstance(value, Text) or value.is_nothing:
                self.wrong(value.at, f"the setting {key!r} needs one value; got {shape(value)}")
            elif self.takes(value.at, solver, {key: value.value}):
                texts[key] = value.value
        return texts

    def images(self, node: Node | None, solver: str) -> dict[str, str]:
        """The setting that tells a solver where pictures of the concept are; folders are relative to the file's own."""
        text = self.text(node, "a folder of pictures")
        if node is None or text is None or not self.is_known(solver):
            return {}
        try:
            # Not composed as names are: a file system may tell both encodings of "é" apart.
            folder = typed_path(text if text.startswith("~") else self.path.parent / text)
            has_pictures = folder.is_dir() and any(file.suffix.lower() in PICTURES for file in folder.iterdir())
        except (OverpaintError, OSError) as error:
            self.wrong(node.at, str(error))
            return {}
        if not folder.is_dir():
            self.wrong(node.at, f"there is no folder {folder}; name one that holds pictures of the concept")
        elif not has_pictures:
            self.wrong(node.at, f"{folder} holds no picture ({', '.join(PICTURES)}); put some there")
        elif "images" not in settable(solver_class(solver)):
            self.wrong(node.at, f"the solver {solver!r} takes no pictures; leave `images` out, or choose another one")
        return {"images": str(folder)}

    def takes(self, at: TextPosition, solver: str, settings: Mapping[str, str]) -> bool:
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
