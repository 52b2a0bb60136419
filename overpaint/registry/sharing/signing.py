"""Detached Ed25519 signatures over the digests of documents, so that one knows whose patches one takes.

A signature says: the holder of this key has signed the document of this digest. The document of a patch follows from its
manifest, and the manifest names every array, so all of the patch is signed. The document of a recipe names its record and
the documents of its patches.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overpaint.core.encoding import canonical_json
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.registry.db_errors import plain_disk_errors
from overpaint.registry.store.patch_files import BadManifest, read_json

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
    files = [file for path in map(Path, named) for file in (sorted(path.glob("*.pub")) if path.is_dir() else [path])]
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
