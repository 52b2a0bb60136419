"""The file a certificate is: JSON Lines of Sigstore bundles, each a DSSE envelope around one in-toto Statement v1.

Formats: Sigstore bundle v0.3 (`application/vnd.dev.sigstore.bundle.v0.3+json`), DSSE v1, in-toto Attestation Framework v1.
Every line and every statement is in canonical form (sorted keys, no spaces, each key once): a file that was spelled
again is refused, so that two readers can never understand it differently.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from overpaint.core.encoding import canonical_json
from overpaint.core.errors import OverpaintError
from overpaint.registry.sharing.signing import Keyring, Signer, key_id
from overpaint.registry.store.patch_files import BadManifest, read_json

BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
LIMIT = 50_000_000
"""The most bytes that are read of a certificate."""


class BadCertificate(OverpaintError):
    """A certificate that is damaged, altered, of another format, or signed by nobody who is trusted."""


@dataclass(frozen=True)
class Opened:
    """The statements of a certificate by predicate type, the key that signed them all, and whether that key is trusted.

    `trusted` is None where nobody said whom to trust: the signatures then fit the key that the certificate itself names.
    """

    statements: Mapping[str, Mapping[str, Any]]
    key: bytes
    trusted: bool | None


def signed_lines(statements: Iterable[Mapping[str, Any]], signer: Signer) -> bytes:
    """Statements, signed, as the bytes of a certificate. The same statements and key give the same bytes."""
    return b"".join(canonical_json(_bundle(canonical_json(each), signer)) + b"\n" for each in statements)


def _bundle(payload: bytes, signer: Signer) -> dict[str, Any]:
    signature = {"keyid": key_id(signer.public), "sig": _text(signer.key.sign(_encoded(payload)))}
    return {
        "mediaType": BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": key_id(signer.public)}, "tlogEntries": []},
        "dsseEnvelope": {"payload": _text(payload), "payloadType": PAYLOAD, "signatures": [signature]},
    }


def opened(content: bytes, keys: Keyring | None) -> Opened:
    """What a certificate states, once its form and its signatures are checked.

    With `keys`, one of them has to have signed every statement; without, the key that the statements name. Raises
    BadCertificate, naming the field that is not as it should be.
    """
    lines = content.splitlines(keepends=True)
    if not lines:
        raise BadCertificate("the certificate is empty; get it from its source again")
    envelopes = [_payload(line, f"line {number}") for number, line in enumerate(lines, 1)]
    statements: dict[str, Mapping[str, Any]] = {}
    for number, (payload, _, _) in enumerate(envelopes, 1):
        statement = _canonical(payload, f"line {number}: dsseEnvelope.payload")
        _same(statement.get("_type"), STATEMENT, f"line {number}: payload._type")
        kind = statement.get("predicateType")
        if not isinstance(kind, str) or kind in statements:
            raise BadCertificate(f"line {number}: payload.predicateType is {kind!r}, which is missing or there twice")
        statements[kind] = statement
    key = _named_key(statements.values())
    for number, (payload, key_named, signature) in enumerate(envelopes, 1):
        where = f"line {number}: dsseEnvelope"
        _same(key_named, key_id(key), f"{where}.signatures[0].keyid")
        if not _fits(key, signature, payload):
            raise BadCertificate(
                f"{where}.signatures[0].sig does not fit {where}.payload under the key {key_id(key)}: one of them was "
                "altered after it was signed"
            )
    if keys is not None and key not in keys.keys:
        raise BadCertificate(
            f"dsseEnvelope.signatures[0].keyid: the certificate is signed by {key_id(key)}, and none of your "
            f"{len(keys.keys)} trusted keys is that one; if you trust it, name its .pub file too"
        )
    return Opened(statements, key, None if keys is None else True)


def producer(signer: Signer, who: str) -> dict[str, Any]:
    """Who signs, as the resource descriptor that a statement carries: a name, and the public key with its digest."""
    public = signer.public
    return {"name": who, "digest": {"sha256": hashlib.sha256(public).hexdigest()}, "content": _text(public)}


def _payload(line: bytes, where: str) -> tuple[bytes, str, bytes]:
    """Payload, key id and signature of one line. Raises BadCertificate unless it is a bundle in canonical form."""
    bundle = _canonical(line.removesuffix(b"\n"), where)
    if not line.endswith(b"\n"):
        raise BadCertificate(f"{where} does not end: the certificate was cut off; get it again")
    try:
        _same(bundle["mediaType"], BUNDLE, f"{where}: mediaType")
        envelope = bundle["dsseEnvelope"]
        _same(envelope["payloadType"], PAYLOAD, f"{where}: dsseEnvelope.payloadType")
        (signature,) = envelope["signatures"]
        material = {"publicKey": {"hint": signature["keyid"]}, "tlogEntries": []}
        _same(bundle["verificationMaterial"], material, f"{where}: verificationMaterial")
        for name, value, known in (
            ("", bundle, {"mediaType", "dsseEnvelope", "verificationMaterial"}),
            ("dsseEnvelope", envelope, {"payload", "payloadType", "signatures"}),
            ("dsseEnvelope.signatures[0]", signature, {"keyid", "sig"}),
        ):
            _same(sorted(value), sorted(known), f"{where}: the fields of {name or 'the bundle'}")
        payload = _bytes(envelope["payload"], f"{where}: dsseEnvelope.payload")
        return payload, str(signature["keyid"]), _bytes(signature["sig"], f"{where}: dsseEnvelope.signatures[0].sig")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadCertificate(f"{where} is no Sigstore bundle with one signature ({error}); get it again") from error


def _canonical(raw: bytes, where: str) -> dict[str, Any]:
    try:
        value = read_json(raw, where)
        again = canonical_json(value)
    except (BadManifest, ValueError, RecursionError) as error:
        raise BadCertificate(f"{where} cannot be read: {error}") from error
    if again != raw:
        raise BadCertificate(
            f"{where} is not in canonical form (sorted keys, each once, no spaces): it was written again by "
            "another program; get the file as it was signed"
        )
    return value


def _named_key(statements: Iterable[Mapping[str, Any]]) -> bytes:
    """The public key of whoever signed, which exactly one statement names as its producer."""
    field = "payload.predicate.producer"
    try:
        (named,) = (each["predicate"]["producer"] for each in statements if "producer" in each["predicate"])
        key = _bytes(named["content"], f"{field}.content")
        _same(named["digest"], {"sha256": hashlib.sha256(key).hexdigest()}, f"{field}.digest")
    except (KeyError, TypeError, ValueError) as error:
        raise BadCertificate(f"{field} is missing or damaged; it names who signed") from error
    if len(key) != 32:
        raise BadCertificate(f"{field}.content is no Ed25519 public key")
    return key


def _fits(key: bytes, signature: bytes, payload: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, _encoded(payload))
    except (InvalidSignature, ValueError):
        return False
    return True


def _encoded(payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding of a payload and its type."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD), PAYLOAD.encode(), len(payload), payload)


def _same(got: object, wanted: object, field: str) -> None:
    if got != wanted:
        raise BadCertificate(f"{field} is {got!r}, and should be {wanted!r}")


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _bytes(text: object, field: str) -> bytes:
    try:
        value = base64.b64decode(str(text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadCertificate(f"{field} is not base64") from error
    if _text(value) != text:
        raise BadCertificate(f"{field} is not canonical base64")
    return value
