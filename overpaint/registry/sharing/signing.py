"""Detached Ed25519 signatures over the digests of documents, and how far a layout is believed because of them.

A signature says: the holder of this key has signed the document of this digest. The document of a patch follows from its
manifest, and the manifest names every array, so all of the patch is signed. The document of a recipe names its record and
the documents of its patches.

A key's list says all that the key has signed in one place, with a counter that grows with every change, so that what somebody
removed, or an older state of the place, is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overpaint.core.encoding import canonical_json
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.core.names import typed_path
from overpaint.registry.database import plain_disk_errors
from overpaint.registry.files import FolderFiles
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
from overpaint.registry.store import BadManifest, read_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


KEY_LIMIT = 10_000
NO_KEYS = (
    "no key to trust was named, so nothing could be verified; name .pub files or folders of them, or ask for no "
    "verification in so many words: --no-verify, or trust=None"
)


class BadKey(OverpaintError):
    """A file that holds no Ed25519 key of the kind that was needed."""


class Untrusted(OverpaintError):
    """What no trusted key has signed, or was altered after it was signed."""


@dataclass(frozen=True)
class Signer:
    """A private key, ready to sign."""

    key: Ed25519PrivateKey

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self.key.public_key().public_bytes_raw()

    def sign(self, digest: str) -> bytes:
        """A signature over a document's digest, as the JSON that travels. The same every time."""
        signature = self.key.sign(_message(digest))
        return canonical_json({"algorithm": "ed25519", "key": self.public.hex(), "signature": signature.hex()})


@dataclass(frozen=True)
class Keyring:
    """The public keys that somebody trusts."""

    keys: frozenset[bytes]

    def __post_init__(self) -> None:
        if not self.keys:
            raise OverpaintError(NO_KEYS)

    def check(self, digest: str, signatures: Iterable[bytes], what: str) -> None:
        """Raise Untrusted unless one of `signatures` is a trusted key's valid signature over the document of `digest`."""
        strangers = []
        for each in signatures:
            key, signature = _parts(each, what)
            if key not in self.keys:
                strangers.append(key_id(key))
            elif _is_valid(key, signature, digest):
                return
            else:
                raise Untrusted(
                    f"the signature of {what} by {key_id(key)} does not fit it: it was altered after it was signed. "
                    "Nothing was taken; get it from its source again"
                )
        if strangers:
            raise Untrusted(
                f"{what} is signed by {', '.join(strangers)}, and none of your {len(self.keys)} trusted keys is among "
                "them; nothing was taken. If you trust that key, get its .pub file from its owner and name it too"
            )
        raise Untrusted(
            f"{what} is not signed, and only what a trusted key has signed was asked for; nothing was taken"
        )


def signer_of(text: bytes, digest: str) -> bytes | None:
    """The public key whose valid signature over the document of `digest` this is; None if it is not one."""
    try:
        key, signature = _parts(text, f"the document {digest}")
    except Untrusted:
        return None
    return key if _is_valid(key, signature, digest) else None


def key_id(public: bytes) -> str:
    """What people call a key: the first 16 digits of the SHA-256 of its 32 bytes."""
    return hashlib.sha256(public).hexdigest()[:16]


def new_key(path: Path, *, for_checkpoints: bool = False) -> bytes:
    """Make a key pair: the private key in `path`, for its owner's eyes only, and the public one beside it, with `.pub`.

    Ed25519, or with `for_checkpoints` ECDSA on P-256, which is what OpenSSF's `model_signing` verifies. Returns the public
    key (Ed25519: 32 bytes; P-256: its DER encoding). Raises AlreadyExists when one of the two files is there.
    """
    with _cryptography():
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import (
            Encoding,
            NoEncryption,
            PrivateFormat,
            PublicFormat,
        )
    key: Ed25519PrivateKey | EllipticCurvePrivateKey = (
        ec.generate_private_key(ec.SECP256R1()) if for_checkpoints else Ed25519PrivateKey.generate()
    )
    public = path.with_name(f"{path.name}.pub")
    for each in (path, public):
        if os.path.lexists(each):
            raise AlreadyExists(f"{each} is there already; a key is never overwritten: name a new file")
    _write_new(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    try:
        _write_new(public, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    if isinstance(key, Ed25519PrivateKey):
        return key.public_key().public_bytes_raw()
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def load_signer(path: Path) -> Signer:
    """The private key in a file that `new_key` wrote. Raises NotFound, BadKey."""
    with _cryptography():
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    try:
        key = load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadKey(f"{path} holds no private key without a password; `overpaint key new FILE` makes one") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BadKey(f"{path} holds a key of another kind than Ed25519; `overpaint key new FILE` makes one")
    return Signer(key)


def load_keyring(paths: Iterable[str | Path]) -> Keyring:
    """The public keys in these files, or in the `.pub` files of these folders.

    Raises NotFound, BadKey, and OverpaintError for an empty list, an empty path, and what is no list.
    """
    if isinstance(paths, (str, Path)) or not isinstance(paths, Iterable):
        raise OverpaintError(f"trust is a list of .pub files or folders, not {paths!r}; write trust=['alice.pub']")
    named = list(paths)
    if not named or not all(isinstance(path, (str, Path)) and str(path).strip() for path in named):
        raise OverpaintError(NO_KEYS)
    files = [
        file for path in map(typed_path, named) for file in (sorted(path.glob("*.pub")) if path.is_dir() else [path])
    ]
    if not files:
        raise NotFound("there is no .pub file among the keys to trust; name one, or a folder with some")
    return Keyring(frozenset(_load_public(file) for file in files))


def _load_public(path: Path) -> bytes:
    with _cryptography():
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    try:
        key = load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BadKey(f"{path} holds no public key; name the .pub file of a key pair") from error
    if not isinstance(key, Ed25519PublicKey):
        raise BadKey(f"{path} holds a key of another kind than Ed25519; name the .pub file of a key pair")
    return key.public_bytes_raw()


def _message(digest: str) -> bytes:
    """What is signed. The first line keeps signatures made for something else from meaning anything here."""
    return b"overpaint signature 1\nsha256:" + digest.encode() + b"\n"


def _parts(text: bytes, what: str) -> tuple[bytes, bytes]:
    try:
        content = read_json(text, f"the signature of {what}")
        if content["algorithm"] != "ed25519":
            raise ValueError(f"the algorithm {content['algorithm']!r}")
        key, signature = bytes.fromhex(content["key"]), bytes.fromhex(content["signature"])
        if (len(key), len(signature)) != (32, 64):
            raise ValueError("a length that no key and no signature has")
    except (BadManifest, KeyError, TypeError, ValueError) as error:
        raise Untrusted(f"the signature of {what} cannot be read ({error}); nothing was taken") from error
    return key, signature


def _is_valid(key: bytes, signature: bytes, digest: str) -> bool:
    with _cryptography():
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, _message(digest))
    except (InvalidSignature, ValueError):
        return False
    return True


@contextmanager
def _cryptography() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise OverpaintError("signatures need the package cryptography; run `pip install 'overpaint[sign]'`") from error


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise NotFound(f"there is no key file {path}; `overpaint key new FILE` makes a key pair")
    with plain_disk_errors(path, reading=True), path.open("rb") as file:
        return file.read(KEY_LIMIT)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a new file whole, or leave nothing. Raises OverpaintError."""
    with plain_disk_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


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
