"""What a layout says is believed as far as trusted keys go: signatures over documents, and each key's signed list.

A signature says that its key signed a document once. A key's list says all that the key has signed in one place, with a
counter that grows with every change, so that what somebody removed, or an older state of the place, is noticed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from overpaint.core.encoding import canonical_json
from overpaint.core.errors import OverpaintError
from overpaint.registry.sharing.documents import (
    COUNTER,
    INDEX_LIMIT,
    KEY,
    NAME,
    PATCH,
    RECIPE,
    REVISIONS,
    SIGNATURE,
    SIGNED_LIST,
    SUBJECT,
    BadLayout,
    Descriptor,
    members_of,
    read_document,
)
from overpaint.registry.sharing.layout import OciLayout
from overpaint.registry.sharing.selection import recipe_at
from overpaint.registry.sharing.signing import Keyring, Untrusted, key_id
from overpaint.registry.store.files import FolderFiles

SIGNATURE_LIMIT = 10_000
SEEN = "seen-lists.json"
"""A file in a registry's folder: per place, the highest counter of each key's list that was seen there."""
SEEN_LIMIT = 64 << 20


@dataclass(frozen=True)
class SignedList:
    """What a key has signed in a place, as `index.json` shall list it."""

    key: bytes
    counter: int
    entry: Descriptor
    members: tuple[Descriptor, ...]


def signatures_of(layout: OciLayout, entries: Iterable[Descriptor], document: str) -> Iterator[bytes]:
    """The signatures over a document that a layout has, not yet checked. Raises BadLayout."""
    for entry in entries:
        # What the index says a signature is about only saves reading the others.
        if entry.artifact_type == SIGNATURE and entry.annotations.get(SUBJECT) == document:
            where = f"the signature {entry.digest} of {layout.where}"
            content = read_document(layout.document(entry), where)
            layers = content.get("layers")
            subject = Descriptor.from_json(content.get("subject"), where)
            if subject.digest == document and isinstance(layers, list) and len(layers) == 1:
                blob = Descriptor.from_json(layers[0], where)
                yield layout.blob(blob.digest, min(blob.size, SIGNATURE_LIMIT))


def signed_list(layout: OciLayout, entries: Sequence[Descriptor], key: bytes) -> SignedList | None:
    """The newest list of a key that a layout has. Raises BadLayout, and Untrusted for one that the key did not sign so."""
    lists = [
        _read_list(layout, entries, entry, key)
        for entry in entries
        if entry.artifact_type == SIGNED_LIST and entry.annotations.get(KEY) == key.hex()
    ]
    return max(lists, key=lambda each: each.counter, default=None)


def _read_list(layout: OciLayout, entries: Sequence[Descriptor], entry: Descriptor, key: bytes) -> SignedList:
    what = f"the signed list of key {key_id(key)} in {layout.where}"
    Keyring(frozenset([key])).check(entry.digest, signatures_of(layout, entries, entry.digest), what)
    content = read_document(layout.document(entry, INDEX_LIMIT), what)
    marks = content.get("annotations")
    counter = _number(marks.get(COUNTER)) if isinstance(marks, dict) else 0
    if not isinstance(marks, dict) or marks.get(KEY) != key.hex() or not counter:
        raise BadLayout(f"{what} lacks its key or its counter; its owner should push again with a newer Overpaint")
    return SignedList(key, counter, entry, tuple(members_of(content, what)))


def _number(text: object) -> int:
    """A whole number as annotations give it; 0 for anything else."""
    return int(text) if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 19 else 0


class Trust:
    """What the trusted keys have signed of what a layout's index lists (`entries`). Raises what `signed_list` raises."""

    def __init__(self, layout: OciLayout, entries: Sequence[Descriptor], keys: Keyring) -> None:
        self._layout, self._keys = layout, keys
        self.lists = [found for key in sorted(keys.keys) if (found := signed_list(layout, entries, key))]
        self._signed = {member.digest: member for each in self.lists for member in each.members}
        self.entries = [self._signed.get(each.digest, each) for each in entries]
        """What the index lists; where a signed list names it too, in the words of that list."""

    def require(self, document: str, what: str) -> None:
        """Raise Untrusted unless a trusted key has signed a document, or a list that names it."""
        if document not in self._signed:
            self._keys.check(document, signatures_of(self._layout, self.entries, document), what)

    def refuse_older(self, folder: Path, accept: bool, *, remember: bool = True) -> None:
        """Raise Untrusted if the registry in `folder` has seen newer lists in this place; `remember` these otherwise.

        What somebody did on purpose is `accept`ed, and remembered in place of what was seen.
        """
        counters = {key.hex(): 0 for key in self._keys.keys} | {each.key.hex(): each.counter for each in self.lists}
        refuse_older(folder, self._layout.where, counters, accept, remembered=remember)

    def refuse_removed(self, is_asked_for: Callable[[Descriptor], bool], warn: Callable[[str], None]) -> None:
        """Raise Untrusted for what a signed list names and the index does not; of what was not asked for, give notice.

        A recipe is not missed when one of the same name, signed too, has at least as many revisions: histories only grow.
        """
        listed, unasked = {each.digest for each in self.entries}, list[str]()
        for signed in self.lists:
            for member in signed.members:
                if member.digest in listed:
                    continue
                what = _called(member)
                if not is_asked_for(member):
                    unasked.append(what)
                elif not self._is_replaced(member):
                    raise Untrusted(
                        f"the index of {self._layout.where} no longer lists {what}, which list {signed.counter} of key "
                        f"{key_id(signed.key)} names: somebody removed it. Nothing was taken; ask the owner of the key to "
                        "push it again"
                    )
        if unasked:
            more = f" and {len(unasked) - 3} more" if len(unasked) > 3 else ""
            warn(
                f"somebody removed {', '.join(unasked[:3])}{more} from the index of {self._layout.where}, although a trusted "
                "key's list names it; it was not asked for"
            )

    def _is_replaced(self, member: Descriptor) -> bool:
        name = member.annotations.get(NAME)
        for each in self.entries:
            if member.artifact_type == each.artifact_type == RECIPE and each.annotations.get(NAME) == name:
                self.require(each.digest, f"the recipe {name!r}")
                record = recipe_at(self._layout, each).record
                if record.name == name and len(record.revisions) >= _number(member.annotations.get(REVISIONS)):
                    return True
        return False


def _called(member: Descriptor) -> str:
    kind = {PATCH: "the patch", RECIPE: "the recipe"}.get(member.artifact_type, "the document")
    return f"{kind} {member.annotations.get(NAME, member.digest[:12])!r}"


def refuse_older(
    folder: Path, where: str, counters: Mapping[str, int], accept: bool, *, remembered: bool = True
) -> None:
    """Raise Untrusted when a key's counter is lower than one that the registry in `folder` saw in a place.

    `counters` are by the key's hexadecimal digits, 0 for a key that has no list there. Otherwise they are remembered.
    """
    seen = _seen(folder).get(where, {})
    for key, counter in sorted(counters.items()):
        if counter < seen.get(key, 0) and not accept:
            shown = f"list {counter}" if counter else "no list"
            raise Untrusted(
                f"{where} shows {shown} of key {key_id(bytes.fromhex(key))}, and this registry has seen list {seen[key]} "
                "there: somebody put an older state in its place. Nothing was changed; ask the owner of the key, and if "
                "the place was begun anew, go on with --accept-older"
            )
    if remembered:
        remember(folder, where, counters)


def remember(folder: Path, where: str, counters: Mapping[str, int]) -> None:
    """Write down the counters of the lists that a place has; 0 forgets a key."""
    if all(_seen(folder).get(where, {}).get(key, 0) == counter for key, counter in counters.items()):
        return
    files = FolderFiles(folder)
    with files.exclusive():
        seen = _seen(folder)
        seen[where] = {key: counter for key, counter in {**seen.get(where, {}), **counters}.items() if counter}
        files.write(SEEN, [canonical_json({place: keys for place, keys in seen.items() if keys})], final=False)


def seen_counter(folder: Path, where: str, key: bytes) -> int:
    """The counter of the newest list of a key that the registry in `folder` has seen in a place, or 0."""
    return _seen(folder).get(where, {}).get(key.hex(), 0)


def _seen(folder: Path) -> dict[str, dict[str, int]]:
    data = FolderFiles(folder).read(SEEN, limit=SEEN_LIMIT)
    try:
        seen = {} if data is None else json.loads(data)
        sound = all(int(number) >= 0 for keys in seen.values() for number in keys.values())
    except (ValueError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise OverpaintError(
            f"{folder / SEEN} is damaged; it remembers the newest signed lists of shared places: put a backup in its place, "
            "or remove it, which forgets them"
        )
    found: dict[str, dict[str, int]] = seen
    return found
