"""The way of a patch from one person to another on the command line, with a real base and a real solver."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import overpaint
from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.core.encoding import canonical_json
from overpaint.core.errors import OverpaintError
from overpaint.patches.delta import TextMap
from overpaint.patches.patch import make_patch
from overpaint.registry.store import digest_of, open_files
from overpaint.workspace.workspace import Workspace
from tests.shell import Shell

from .conftest import is_empty
from .test_hostile import sent


@pytest.fixture
def alice(tmp_path: Path, base_folder: Path) -> Shell:
    alice = Shell(tmp_path / "alice")
    alice.ok("base", "add", "tiny", str(base_folder))
    alice.ok("solve", "cat", "dog", "--base", "tiny")
    alice.ok("patch", "add", "cat", "dog", "--recipe", "safe", "--why", "takedown of Monday")
    alice.ok("patch", "remove", "dog", "--recipe", "safe")
    return alice


@pytest.fixture
def bob(tmp_path: Path, base_folder: Path) -> Shell:
    bob = Shell(tmp_path / "bob")
    bob.ok("base", "add", "my-tiny", str(base_folder))
    return bob


def weights(person: Shell) -> str:
    return overpaint.open(person.registry).recipe("safe").digest()


def test_a_recipe_that_was_pushed_gives_the_same_weights_where_it_is_pulled(
    alice: Shell, bob: Shell, tmp_path: Path
) -> None:
    assert "2 patches, 1 recipes" in alice.ok("push", str(tmp_path / "shared"))
    taken = json.loads(bob.ok("pull", str(tmp_path / "shared"), "--json"))
    assert [(row["what"], row["state"]) for row in taken] == [("patch", "new"), ("patch", "new"), ("recipe", "new")]
    assert weights(bob) == weights(alice)
    log = json.loads(bob.ok("recipe", "log", "safe", "--json"))
    assert log == json.loads(alice.ok("recipe", "log", "safe", "--json"))
    assert "0 blobs were missing" in alice.ok("push", str(tmp_path / "shared"))
    bob.ok("verify")
    bob.ok("build", "safe", str(tmp_path / "built"))


def test_a_recipe_goes_from_hand_to_hand_in_one_file(alice: Shell, bob: Shell, tmp_path: Path) -> None:
    file = str(tmp_path / "safe.overpaint")
    alice.ok("export", "--recipe", "safe", "-o", file)
    assert "already there" in alice.fails("export", "--recipe", "safe", "-o", file)
    bob.ok("import", file, "--as", "theirs")
    assert overpaint.open(bob.registry).recipe("theirs").digest() == weights(alice)
    assert "known" in bob.ok("import", file, "cat")


def test_only_what_is_signed_by_a_trusted_key_is_pulled(alice: Shell, bob: Shell, tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason='cryptography is not installed; pip install -e ".[dev]" does')
    shared, key = str(tmp_path / "shared"), str(tmp_path / "key")
    assert "give" in alice.ok("key", "new", key)
    assert "never overwritten" in alice.fails("key", "new", key)
    alice.ok("push", shared)
    assert "is not signed" in bob.fails("pull", shared, "--trust", f"{key}.pub")
    assert "no key to trust" in bob.fails("pull", shared, "--trust", "")
    alice.ok("export", "-o", f"{shared}.overpaint")
    assert "no key to trust" in bob.fails("import", f"{shared}.overpaint", "--trust", "")
    assert "no key file" in alice.fails("push", shared, "--sign", "")
    assert "contradict" in bob.fails("pull", shared, "--trust", f"{key}.pub", "--no-verify")
    for trust, message in (([], "no key to trust"), ([""], "no key to trust"), (f"{key}.pub", "is a list")):
        with pytest.raises(OverpaintError, match=message):
            overpaint.open(bob.registry).pull(shared, trust=trust)
    assert is_empty(overpaint.open(bob.registry).registry)
    assert json.loads(bob.ok("patch", "list", "--json")) == []
    alice.ok("push", shared, "--sign", key)
    bob.ok("pull", shared, "--trust", str(tmp_path), "--recipe", "safe")
    assert weights(bob) == weights(alice)
    (tmp_path / "shared" / "index.json").unlink()
    alice.ok("push", shared)
    assert "--accept-older" in bob.fails("pull", shared, "--trust", f"{key}.pub")
    assert "--accept-older" in alice.fails("push", shared, "--sign", key)
    alice.ok("push", shared, "--sign", key, "--accept-older")
    bob.ok("pull", shared, "--trust", f"{key}.pub")
    assert "no .pub file" in bob.fails("pull", shared, "--trust", str(tmp_path / "alice"))


def test_a_mistake_gets_one_sentence(alice: Shell, bob: Shell, tmp_path: Path) -> None:
    alice.ok("push", str(tmp_path / "shared"), "cat")
    for words, message in (
        (("pull", str(tmp_path / "nowhere")), "nothing was ever pushed"),
        (("pull", str(tmp_path / "shared"), "dog"), "has no patch 'dog'"),
        (("pull", "nothing://x"), "cannot be reached"),
        (("push", str(tmp_path / "out"), "--sign", str(tmp_path / "no-key")), "no key file"),
        (("push", str(tmp_path / "out"), "fox"), "fox"),
        (("export", "-o", str(tmp_path / "nowhere" / "x")), "no folder"),
        (("import", str(tmp_path / "nothing")), "no file"),
        (("init", "--blobs", "nothing://x"), "cannot be reached"),
    ):
        said = bob.fails(*words)
        assert message in said
        assert len(said.strip().splitlines()) <= 4
    stranger = Shell(tmp_path / "stranger")
    assert "overpaint init" in stranger.fails("pull", str(tmp_path / "shared"))
    stranger.ok("init")
    assert "overpaint base add" in stranger.fails("pull", str(tmp_path / "shared"))


def test_a_patch_that_this_program_cannot_use_is_refused_on_arrival(bob: Shell, base: Base, tmp_path: Path) -> None:
    """Every digest is right, but the values are not finite, or the kind is unknown."""
    delta = TextMap("text_encoder", torch.ones(64, 1), torch.ones(64, 1))
    good = make_patch(base, Concept("cat"), delta, {"name": "test", "settings": {}, "seed": 0})
    workspace = Workspace.open(bob.registry)
    for number, (kind, value) in enumerate((("text-map", float("nan")), ("wish", 1.0), ("dense", float("inf")))):
        arrays, values = {}, {}
        for name in good.manifest["arrays"]:
            raw = torch.full((64, 1), value).numpy().tobytes()
            digest = digest_of([canonical_json([name, "float32", [64, 1]]), raw])
            arrays[name], values[name] = {"dtype": "float32", "shape": [64, 1], "digest": digest}, raw
        folder = sent(tmp_path / f"shared {number}", {**good.manifest, "kind": kind, "arrays": arrays}, values)
        with pytest.raises(OverpaintError):
            workspace.pull(folder)
    assert is_empty(workspace.registry)


def test_a_registry_may_keep_its_blobs_behind_a_url(tmp_path: Path, base_folder: Path) -> None:
    url = f"memory://{tmp_path.name}/blobs"
    person = Shell(tmp_path / "registry")
    person.ok("init", "--blobs", url)
    person.ok("base", "add", "tiny", str(base_folder))
    person.ok("solve", "cat", "--base", "tiny")
    assert any(open_files(url).walk("blobs"))
    assert not (tmp_path / "registry" / "blobs").exists()
    person.ok("patch", "show", "cat")
    person.ok("verify")
    person.ok("gc", "--grace", "0")
    assert "has blobs in" in person.fails("init", "--blobs", str(tmp_path / "elsewhere"))


def test_what_was_not_verified_is_called_so(alice: Shell, bob: Shell, tmp_path: Path) -> None:
    shared, key = str(tmp_path / "shared"), str(tmp_path / "alice.key")
    alice.ok("key", "new", key)
    alice.ok("push", shared, "--sign", key)
    assert "not verified" not in bob("pull", shared, "--trust", f"{key}.pub").stderr
    assert "not verified" in bob("pull", shared).stderr
    assert "not verified" not in bob("pull", shared, "--no-verify").stderr
    assert not overpaint.open(bob.registry).pull(shared).verified
