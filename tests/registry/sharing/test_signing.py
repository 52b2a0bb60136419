"""Where trust is asked for, only what a trusted key has signed is taken, exactly as it was signed."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography", reason='cryptography is not installed; pip install -e ".[dev]" does')

from overpaint.core.encoding import canonical_json
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.registry import Registry
from overpaint.registry.sharing.documents import (
    NAME,
    PATCH,
    RECIPE,
    SIGNATURE,
    SIGNED_LIST,
    SUBJECT,
    Descriptor,
    signature_document,
)
from overpaint.registry.sharing.ingest import PullRequest, import_file, pull
from overpaint.registry.sharing.layout import ArchiveReader, OciLayout
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
from tests.registry.contents import lay

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
    assert len(signatures) == 2 * (4 + 1)  # three patches, a recipe, and the list of each key
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


def refused(
    theirs: Registry, place: Path, request: PullRequest, message: str, kind: type[Exception] = Untrusted
) -> None:
    with pytest.raises(kind, match=message):
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


def edit_index(place: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Do what somebody with the folder, but without a key, can do to the index."""
    index = json.loads((place / "index.json").read_bytes())
    (place / "index.json").write_bytes(canonical_json({**index, "manifests": change(index["manifests"])}))


def called(entry: dict[str, Any]) -> str:
    return str(entry["annotations"].get(NAME))


@pytest.fixture
def signed(ours: Registry, place: Path, alice: Path) -> Path:
    """A place with all that is ours and with a second recipe, "weak", signed by Alice."""
    ours.create_recipe("weak", "sd15")
    lay(ours, "weak", ours.patches()[0].id, -3.0)
    push(ours, place, signer=load_signer(alice))
    return place


def asking(*recipes: str, keys: Path, **rest: Any) -> PullRequest:
    return PullRequest(recipes=recipes, trusted=load_keyring([public(keys)]), **rest)


def test_an_index_that_calls_another_signed_recipe_by_the_name_that_was_asked_for_yields_nothing(
    theirs: Registry, signed: Path, alice: Path
) -> None:
    def rename(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        others = [each for each in entries if each["artifactType"] != RECIPE or called(each) != "safe"]
        for each in others:
            if called(each) == "weak":
                each["annotations"] = dict.fromkeys(each["annotations"], "safe")
        return others

    edit_index(signed, rename)
    for request in (asking("safe", keys=alice), PullRequest(recipes=["safe"])):
        with pytest.raises(OverpaintError, match="'safe'"):
            pull(theirs, signed, request)
        assert is_empty(theirs)


def test_a_forged_name_beside_the_true_one_brings_only_what_was_asked_for(
    theirs: Registry, signed: Path, alice: Path
) -> None:
    def rename(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {**each, "annotations": {**each["annotations"], NAME: "safe"}} if called(each) == "weak" else each
            for each in entries
        ]

    edit_index(signed, rename)
    for request in (asking("safe", keys=alice), PullRequest(recipes=["safe"])):
        assert [name for name, _ in pull(theirs, signed, request).recipes] == ["safe"]
    assert [each.name for each in theirs.recipes()] == ["safe"]


def test_a_name_that_the_index_hides_is_found_in_what_is_signed(theirs: Registry, signed: Path, alice: Path) -> None:
    edit_index(
        signed, lambda entries: [{**each, "annotations": {**each["annotations"], NAME: "x"}} for each in entries]
    )
    assert pull(theirs, signed, PullRequest(recipes=["safe"], patches=["plum"])).recipes == (("safe", "new"),)
    assert "safe" in dict(pull(theirs, signed, asking("safe", keys=alice)).recipes)


def test_what_was_removed_from_the_index_is_noticed(theirs: Registry, signed: Path, alice: Path) -> None:
    def remove(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [each for each in entries if each["artifactType"] != RECIPE or called(each) != "safe"]

    edit_index(signed, remove)
    refused(theirs, signed, trusting(alice), "no longer lists the recipe 'safe', which list 1 of key")
    refused(theirs, signed, asking("safe", keys=alice), "somebody removed it")
    refused(theirs, signed, PullRequest(recipes=["safe"]), "has no recipe 'safe'", NotFound)
    warned: list[str] = []
    assert pull(theirs, signed, asking("weak", keys=alice, warn=warned.append)).recipes == (("weak", "new"),)
    assert "removed the recipe 'safe'" in warned[0]


def test_an_empty_index_is_noticed(ours: Registry, theirs: Registry, signed: Path, alice: Path) -> None:
    lists = [SIGNED_LIST, SIGNATURE]
    edit_index(signed, lambda entries: [each for each in entries if each["artifactType"] in lists])
    refused(theirs, signed, trusting(alice), "somebody removed it")
    push(ours, signed)
    pull(theirs, signed, trusting(alice))
    edit_index(signed, lambda entries: [])
    with pytest.raises(Untrusted, match=r"shows no list of key .* has seen list 1"):
        pull(theirs, signed, trusting(alice))
    warned: list[str] = []
    pull(theirs, signed, PullRequest(warn=warned.append))
    assert "lists no patches and no recipes" in warned[0]
    with pytest.raises(NotFound, match="has no recipe 'safe'"):
        pull(theirs, signed, asking("safe", keys=alice, accept_older=True))


def test_an_older_state_of_a_place_is_noticed_by_who_has_seen_a_newer_one(
    ours: Registry, theirs: Registry, signed: Path, alice: Path
) -> None:
    older = (signed / "index.json").read_bytes()
    lay(ours, "safe", ours.patches()[2].id, 1.0, why="a takedown")
    push(ours, signed, signer=load_signer(alice))
    newer = (signed / "index.json").read_bytes()
    pull(theirs, signed, asking("weak", keys=alice))
    (signed / "index.json").write_bytes(older)
    with pytest.raises(Untrusted, match=r"shows list 1 of key .* has seen list 2 there: .*--accept-older"):
        pull(theirs, signed, asking("safe", keys=alice))
    with pytest.raises(Untrusted, match="has seen list 2"):
        push(ours, signed, signer=load_signer(alice))
    assert [each.name for each in theirs.recipes()] == ["weak"]
    assert pull(theirs, signed, asking("safe", keys=alice, accept_older=True)).recipes == (("safe", "new"),)
    assert pull(theirs, signed, asking("safe", keys=alice)).recipes == (("safe", "the same"),)
    (signed / "index.json").write_bytes(newer)
    assert pull(theirs, signed, asking("safe", keys=alice)).recipes == (("safe", "updated"),)


def test_a_recipe_put_back_to_an_older_revision_is_noticed_also_at_first_sight(
    ours: Registry, theirs: Registry, signed: Path, alice: Path
) -> None:
    def recipe(entries: list[dict[str, Any]]) -> dict[str, Any]:
        return next(each for each in entries if each["artifactType"] == RECIPE and called(each) == "safe")

    before = json.loads((signed / "index.json").read_bytes())["manifests"]
    signature = next(each for each in before if each["annotations"].get(SUBJECT) == recipe(before)["digest"][7:])
    lay(ours, "safe", ours.patches()[2].id, 1.0, why="a takedown")
    push(ours, signed, signer=load_signer(alice))

    def put_back(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*(each for each in entries if each != recipe(entries)), recipe(before), signature]

    edit_index(signed, put_back)
    refused(theirs, signed, asking("safe", keys=alice), "no longer lists the recipe 'safe', which list 2 of key")


def test_two_who_sign_may_carry_each_others_recipes_on(
    ours: Registry, theirs: Registry, signed: Path, alice: Path, bob: Path
) -> None:
    pull(theirs, signed, trusting(alice))
    lay(theirs, "safe", theirs.patches()[2].id, 1.0)
    push(theirs, signed, signer=load_signer(bob))
    assert ("safe", "updated") in pull(ours, signed, trusting(alice, bob)).recipes
    push(ours, signed, signer=load_signer(alice))
    assert ("safe", "the same") in pull(theirs, signed, trusting(alice)).recipes


def test_pushing_what_is_there_changes_no_list_and_pushing_more_keeps_what_was_on_it(
    ours: Registry, theirs: Registry, place: Path, alice: Path
) -> None:
    def signed_lists() -> list[dict[str, str]]:
        entries = OciLayout(open_files(place)).entries()
        return [dict(each.annotations) for each in entries if each.artifact_type == SIGNED_LIST]

    for number, patch in enumerate(("plum", "plum", "apple")):
        push(ours, place, patches=[patch], signer=load_signer(alice))
        key = load_signer(alice).public.hex()
        assert signed_lists() == [{"org.overpaint.key": key, "org.overpaint.counter": "112"[number]}]
    push(ours, place)
    assert len(signed_lists()) == 1
    edit_index(place, lambda entries: [each for each in entries if called(each) != "plum"])
    refused(theirs, place, PullRequest(patches=["plum"], trusted=load_keyring([public(alice)])), "the patch 'plum'")


def test_a_place_that_was_begun_anew_goes_on_counting(
    ours: Registry, theirs: Registry, signed: Path, alice: Path
) -> None:
    pull(theirs, signed, trusting(alice))
    shutil.rmtree(signed)
    push(ours, signed, patches=["plum"], signer=load_signer(alice))
    assert len(pull(theirs, signed, trusting(alice)).known) == 1


def test_a_signed_archive_has_a_list_too(ours: Registry, theirs: Registry, tmp_path: Path, alice: Path) -> None:
    export(ours, tmp_path / "one", signer=load_signer(alice))
    assert len(import_file(theirs, tmp_path / "one", trusting(alice)).new) == 3
    with (tmp_path / "one").open("rb") as file:
        entries = OciLayout(ArchiveReader(file, "one")).entries()
    (listed,) = (each for each in entries if each.artifact_type == SIGNED_LIST)
    assert listed.annotations["org.overpaint.counter"] == "1"
    assert not (theirs.folder / "seen-lists.json").exists()


def test_a_damaged_memory_of_lists_gets_a_sentence(theirs: Registry, signed: Path, alice: Path) -> None:
    for content in (b"{", b"[]", b'{"x":{"y":"z"}}', b'{"x":7}'):
        (theirs.folder / "seen-lists.json").write_bytes(content)
        refused(theirs, signed, trusting(alice), "is damaged", OverpaintError)


def test_no_list_of_keys_is_no_verification() -> None:
    for keys in ([], [""], [" "], [None], iter(())):
        with pytest.raises(OverpaintError, match="no key to trust"):
            load_keyring(keys)  # type: ignore[arg-type]
    for no_list in ("alice.pub", Path("alice.pub"), 7, False):
        with pytest.raises(OverpaintError, match="is a list"):
            load_keyring(no_list)  # type: ignore[arg-type]
    with pytest.raises(OverpaintError, match="no key to trust"):
        Keyring(frozenset())


def test_a_bare_patch_file_is_never_trusted(theirs: Registry, tmp_path: Path, alice: Path) -> None:
    (tmp_path / "bare").write_bytes(labelled("one"))
    with pytest.raises(Untrusted, match="carries no signature"):
        import_file(theirs, tmp_path / "bare", trusting(alice))


def replace_signatures(place: Path, change: Callable[[Descriptor, dict[str, Any]], dict[str, Any]]) -> None:
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
            text = json.loads(files.read("blobs/sha256/" + document["layers"][0]["digest"][7:]) or b"")
            signed = entries[each.annotations[SUBJECT]]
            data = canonical_json(change(signed, text))
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
        (lambda signed, text: {**text, "signature": "00" * 64}, "altered after it was signed"),
        (lambda signed, text: {**text, "signature": text["signature"][:-2]}, "cannot be read"),
        (lambda signed, text: {**text, "signature": 7}, "cannot be read"),
        (lambda signed, text: {**text, "key": "zz" * 32}, "cannot be read"),
        (lambda signed, text: {**text, "algorithm": "none"}, "cannot be read"),
        (lambda signed, text: {}, "cannot be read"),
        (lambda signed, text: {**text, "key": "11" * 32}, "signed by"),
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
    replace_signatures(place, change)
    refused(theirs, place, trusting(alice), message)


def test_a_signature_over_one_patch_does_not_fit_another(
    ours: Registry, theirs: Registry, place: Path, alice: Path
) -> None:
    push(ours, place, patches=["plum"], signer=load_signer(alice))
    text = load_signer(alice).sign(OciLayout(open_files(place)).entries()[0].digest)
    push(ours, place, patches=["apple"], signer=load_signer(alice))
    replace_signatures(place, lambda signed, _: json.loads(text))
    refused(theirs, place, trusting(alice), "altered after it was signed")


def test_a_patch_that_was_altered_after_it_was_signed_is_refused(
    ours: Registry, theirs: Registry, place: Path, alice: Path
) -> None:
    """Somebody with the folder puts another patch of theirs into the list and claims the old signature for it."""
    push(ours, place, patches=["plum"], signer=load_signer(alice))
    push(ours, place, patches=["apple"])
    layout = OciLayout(open_files(place))
    entries = layout.entries()
    patches = {each.digest: each for each in entries if each.artifact_type == PATCH}
    (signature,) = (each for each in entries if each.annotations.get(SUBJECT) in patches)
    (stranger,) = (each for each in patches.values() if each.digest != signature.annotations[SUBJECT])
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
    assert signer.sign("0" * 64) == load_signer(alice).sign("0" * 64)
    Keyring(frozenset([signer.public])).check("0" * 64, [signer.sign("0" * 64)], "it")
