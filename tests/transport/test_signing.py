"""Where trust is asked for, only what a trusted key has signed is taken, exactly as it was signed."""

from __future__ import annotations

import errno
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography", reason='cryptography is not installed; pip install -e ".[dev]" does')

from overpaint.core.digests import canonical_json
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.registry import Registry
from overpaint.registry.sharing.ingest import PullRequest, import_file, pull
from overpaint.registry.sharing.layout import RECIPE, SIGNATURE, SUBJECT, Descriptor, OciLayout, signature_document
from overpaint.registry.sharing.sending import export, push
from overpaint.registry.sharing.signing import (
    BadKey,
    Keyring,
    Signer,
    Untrusted,
    key_id,
    load_keyring,
    load_signer,
    new_key,
)
from overpaint.registry.store import open_files
from tests.registry.shelf import lay

from .conftest import holdings, is_empty, labelled

ALL = PullRequest()


@pytest.fixture
def alice(tmp_path: Path) -> Path:
    new_key(tmp_path / "alice")
    return tmp_path / "alice"


@pytest.fixture
def bob(tmp_path: Path) -> Path:
    new_key(tmp_path / "bob")
    return tmp_path / "bob"


def public(path: Path) -> Path:
    return path.with_name(f"{path.name}.pub")


def trusting(*paths: Path) -> PullRequest:
    return PullRequest(trusted=load_keyring(public(path) for path in paths))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "shared"


def test_a_private_key_is_for_its_owners_eyes_and_is_never_overwritten(alice: Path) -> None:
    assert alice.stat().st_mode & 0o777 == 0o600
    before = alice.read_bytes(), public(alice).read_bytes()
    with pytest.raises(AlreadyExists, match="never overwritten"):
        new_key(alice)
    alice.unlink()
    with pytest.raises(AlreadyExists, match="never overwritten"):
        new_key(alice)
    assert public(alice).read_bytes() == before[1]
    assert not alice.exists()


@pytest.mark.parametrize("failing", [1, 2])
def test_a_key_on_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    calls = itertools.count(1)

    def fsync(descriptor: int) -> None:
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    folder = tmp_path / "keys"
    folder.mkdir()
    with pytest.raises(OverpaintError, match="is full"):
        new_key(folder / "key")
    assert list(folder.iterdir()) == []


def test_what_a_trusted_key_signed_is_taken(
    ours: Registry, theirs: Registry, place: Path, alice: Path, bob: Path
) -> None:
    push(ours, place, signer=load_signer(alice))
    pull(theirs, place, trusting(bob, alice))
    assert holdings(theirs) == holdings(ours)


def test_signing_again_writes_nothing_and_two_may_sign(
    ours: Registry, theirs: Registry, place: Path, alice: Path, bob: Path
) -> None:
    push(ours, place, signer=load_signer(alice))
    assert push(ours, place, signer=load_signer(alice)).written == 0
    push(ours, place, signer=load_signer(bob))
    signatures = [each for each in OciLayout(open_files(place)).entries() if each.artifact_type == SIGNATURE]
    assert len(signatures) == 2 * 4
    pull(theirs, place, trusting(bob))


def test_what_was_pushed_unsigned_can_be_signed_later(
    ours: Registry, theirs: Registry, place: Path, alice: Path
) -> None:
    push(ours, place)
    push(ours, place, signer=load_signer(alice))
    pull(theirs, place, trusting(alice))


def test_an_archive_carries_its_signatures(ours: Registry, theirs: Registry, tmp_path: Path, alice: Path) -> None:
    export(ours, tmp_path / "file", signer=load_signer(alice))
    export(ours, tmp_path / "same", signer=load_signer(alice))
    assert (tmp_path / "file").read_bytes() == (tmp_path / "same").read_bytes()
    import_file(theirs, tmp_path / "file", trusting(alice))
    assert holdings(theirs) == holdings(ours)


def refused(theirs: Registry, place: Path, request: PullRequest, message: str) -> None:
    with pytest.raises(Untrusted, match=message):
        pull(theirs, place, request)
    assert is_empty(theirs)
    assert list(theirs.blobs.digests()) == []


def test_what_is_not_signed_is_refused(ours: Registry, theirs: Registry, place: Path, alice: Path) -> None:
    push(ours, place)
    refused(theirs, place, trusting(alice), "patch .* is not signed")


def test_what_a_stranger_signed_is_refused_and_the_stranger_named(
    ours: Registry, theirs: Registry, place: Path, alice: Path, bob: Path
) -> None:
    push(ours, place, signer=load_signer(bob))
    refused(theirs, place, trusting(alice), f"signed by {key_id(load_signer(bob).public)}")


def test_one_unsigned_patch_among_signed_ones_is_refused(
    ours: Registry, theirs: Registry, place: Path, alice: Path
) -> None:
    push(ours, place, patches=["plum"], signer=load_signer(alice))
    push(ours, place, patches=["apple"])
    refused(theirs, place, trusting(alice), r"patch .* \(apple\) is not signed")
    pull(theirs, place, PullRequest(patches=["plum"], trusted=load_keyring([public(alice)])))
    assert len(theirs.patches()) == 1


def test_a_recipe_must_be_signed_too(ours: Registry, theirs: Registry, place: Path, alice: Path) -> None:
    push(ours, place, signer=load_signer(alice))
    lay(ours, "safe", ours.patches()[2].id, 1.0)
    push(ours, place)
    refused(theirs, place, trusting(alice), "the recipe 'safe' is not signed")
    assert not any(
        each.annotations[SUBJECT] not in {other.digest for other in OciLayout(open_files(place)).entries()}
        for each in OciLayout(open_files(place)).entries()
        if each.artifact_type == SIGNATURE
    )


def test_a_bare_patch_file_is_never_trusted(theirs: Registry, tmp_path: Path, alice: Path) -> None:
    (tmp_path / "bare").write_bytes(labelled("one"))
    with pytest.raises(Untrusted, match="carries no signature"):
        import_file(theirs, tmp_path / "bare", trusting(alice))


def replace_seals(place: Path, change: Callable[[Descriptor, dict[str, Any]], dict[str, Any]]) -> None:
    """Do what somebody without the key, but with the folder, can do: rewrite every signature, with digests that fit."""
    layout, files = OciLayout(open_files(place)), open_files(place)

    def changed(before: list[Descriptor]) -> list[Descriptor]:
        entries = {each.digest: each for each in before}
        found = []
        for each in before:
            if each.artifact_type != SIGNATURE:
                found.append(each)
                continue
            document = json.loads(layout.document(each))
            seal = json.loads(files.read("blobs/sha256/" + document["layers"][0]["digest"][7:]) or b"")
            signed = entries[each.annotations[SUBJECT]]
            data = canonical_json(change(signed, seal))
            layout.put(Descriptor.of(data, "").digest, len(data), [data])
            forged = signature_document(data, signed)
            layout.put_document(forged)
            where = forged.descriptor
            found.append(Descriptor(where.media_type, where.digest, where.size, SIGNATURE, {SUBJECT: signed.digest}))
        return found

    layout.update(changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda signed, seal: {**seal, "signature": "00" * 64}, "altered after it was signed"),
        (lambda signed, seal: {**seal, "signature": seal["signature"][:-2]}, "cannot be read"),
        (lambda signed, seal: {**seal, "signature": 7}, "cannot be read"),
        (lambda signed, seal: {**seal, "key": "zz" * 32}, "cannot be read"),
        (lambda signed, seal: {**seal, "algorithm": "none"}, "cannot be read"),
        (lambda signed, seal: {}, "cannot be read"),
        (lambda signed, seal: {**seal, "key": "11" * 32}, "signed by"),
    ],
)
def test_a_signature_that_was_tampered_with_is_refused(
    ours: Registry,
    theirs: Registry,
    place: Path,
    alice: Path,
    change: Callable[[Descriptor, dict[str, Any]], dict[str, Any]],
    message: str,
) -> None:
    push(ours, place, signer=load_signer(alice))
    replace_seals(place, change)
    refused(theirs, place, trusting(alice), message)


def test_a_signature_over_one_patch_does_not_fit_another(
    ours: Registry, theirs: Registry, place: Path, alice: Path
) -> None:
    push(ours, place, patches=["plum"], signer=load_signer(alice))
    seal = load_signer(alice).seal(OciLayout(open_files(place)).entries()[0].digest)
    push(ours, place, patches=["apple"], signer=load_signer(alice))
    replace_seals(place, lambda signed, _: json.loads(seal))
    refused(theirs, place, trusting(alice), "altered after it was signed")


def test_a_patch_that_was_altered_after_it_was_signed_is_refused(
    ours: Registry, theirs: Registry, place: Path, alice: Path
) -> None:
    """Somebody with the folder puts another patch of theirs into the list and claims the old signature for it."""
    push(ours, place, patches=["plum"], signer=load_signer(alice))
    push(ours, place, patches=["apple"])
    layout = OciLayout(open_files(place))
    entries = layout.entries()
    (signature,) = (each for each in entries if each.artifact_type == SIGNATURE)
    (stranger,) = (
        each
        for each in entries
        if each.artifact_type not in (SIGNATURE, RECIPE) and each.digest != signature.annotations[SUBJECT]
    )
    claimed = Descriptor(signature.media_type, signature.digest, signature.size, SIGNATURE, {SUBJECT: stranger.digest})
    layout.update(lambda before: [stranger, claimed])
    refused(theirs, place, trusting(alice), "is not signed")


@pytest.mark.parametrize("content", [b"", b"no key", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
def test_a_file_without_a_key_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(BadKey, match="holds no private key"):
        load_signer(tmp_path / "x")
    with pytest.raises(BadKey, match="holds no public key"):
        load_keyring([tmp_path / "x"])


def test_keys_of_another_kind_are_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = generate_private_key(SECP256R1())
    (tmp_path / "ec").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "ec.pub").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(BadKey, match="another kind than Ed25519"):
        load_signer(tmp_path / "ec")
    with pytest.raises(BadKey, match="another kind than Ed25519"):
        load_keyring([tmp_path / "ec.pub"])


def test_keys_may_lie_in_a_folder_and_must_be_there(tmp_path: Path, alice: Path, bob: Path) -> None:
    ring = load_keyring([tmp_path])
    assert ring == Keyring(frozenset(load_signer(path).public for path in (alice, bob)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match=r"no \.pub file"):
        load_keyring([tmp_path / "empty"])
    with pytest.raises(NotFound, match="no key file"):
        load_keyring([tmp_path / "nowhere.pub"])
    with pytest.raises(NotFound, match="no key file"):
        load_signer(tmp_path / "nowhere")


def test_without_the_package_the_way_to_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.ed25519", None)
    with pytest.raises(OverpaintError, match=r"overpaint\[sign\]"):
        new_key(tmp_path / "key")
    assert os.listdir(tmp_path) == []


def test_a_signer_signs_alike_every_time(alice: Path) -> None:
    signer: Signer = load_signer(alice)
    assert signer.seal("0" * 64) == load_signer(alice).seal("0" * 64)
    Keyring(frozenset([signer.public])).check("0" * 64, [signer.seal("0" * 64)], "it")
