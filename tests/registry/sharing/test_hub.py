"""Patches on the Hugging Face Hub, against a stand-in for its API: see hub_server."""

from __future__ import annotations

import tracemalloc

import pytest

from overpaint.core.errors import NotFound, OverpaintError
from overpaint.registry import Registry
from overpaint.registry.files import Unreachable
from overpaint.registry.sharing.documents import BadLayout
from overpaint.registry.sharing.hub import is_hub
from overpaint.registry.sharing.ingest import PullRequest, pull
from overpaint.registry.sharing.sending import push

from .conftest import holdings, is_empty
from .hub_server import READER, Hub

ALL = PullRequest()
REPO, PLACE = "ada/patches", "hf://ada/patches"


def test_a_push_is_one_commit_and_is_pulled_whole(ours: Registry, theirs: Registry, hub: Hub) -> None:
    sent = push(ours, PLACE, beside=lambda entries: {"README.md": f"library_name: overpaint {len(entries)}".encode()})
    assert len(hub.repositories[REPO]) == 2, "the one that made the repository, and ours"
    assert REPO in hub.private
    assert (hub.files(REPO) or {})["README.md"] == b"library_name: overpaint 4"
    assert set(pull(theirs, PLACE, ALL).new) == set(sent.patches)
    assert holdings(theirs) == holdings(ours)
    again = push(ours, PLACE)
    assert (again.written, len(hub.repositories[REPO])) == (0, 2)


def test_a_revision_is_pulled_as_it_was(ours: Registry, theirs: Registry, hub: Hub) -> None:
    first, second, _ = (record.id for record in ours.patches())
    push(ours, PLACE, patches=[first])
    then = hub.repositories[REPO][-1][0]
    push(ours, PLACE, patches=[second])
    assert pull(theirs, f"{PLACE}@{then}", ALL).new == (first,)
    assert pull(theirs, PLACE, ALL).new == (second,)
    with pytest.raises(Unreachable, match="has no revision 'nowhere'"):
        pull(theirs, f"{PLACE}@nowhere", ALL)


def test_a_branch_that_moved_meanwhile_is_merged(ours: Registry, theirs: Registry, hub: Hub) -> None:
    first, second, third = (record.id for record in ours.patches())
    push(ours, PLACE, patches=[first])

    def moving() -> None:
        hub.before_commit = lambda: None
        push(ours, PLACE, patches=[second])

    hub.before_commit = moving
    push(ours, PLACE, patches=[third])
    assert set(pull(theirs, PLACE, ALL).new) == {first, second, third}


def test_a_token_that_may_not_write_leaves_nothing(
    ours: Registry, theirs: Registry, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(ours, PLACE, patches=["plum"])
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(Unreachable, match="a token that may write"):
        push(ours, PLACE)
    assert len(hub.repositories[REPO]) == 2
    assert len(pull(theirs, PLACE, ALL).new) == 1


def test_a_repository_that_is_not_there_or_holds_something_else_is_refused(theirs: Registry, hub: Hub) -> None:
    with pytest.raises(NotFound, match="nothing was ever pushed"):
        pull(theirs, PLACE, ALL)
    hub.commit(REPO, {"README.md": b"a model"})
    with pytest.raises(NotFound, match="nothing was ever pushed"):
        pull(theirs, PLACE, ALL)


def test_somebodys_own_card_is_left_alone(ours: Registry, hub: Hub) -> None:
    hub.commit(REPO, {"README.md": b"my own words"})
    push(ours, PLACE, beside=lambda entries: {"README.md": b"library_name: overpaint", "more": b"1"})
    files = hub.files(REPO) or {}
    assert (files["README.md"], files["more"]) == (b"my own words", b"1")


def test_a_blob_that_is_not_what_its_digest_says_is_refused(ours: Registry, theirs: Registry, hub: Hub) -> None:
    id = push(ours, PLACE).patches[0]
    hub.commit(REPO, {f"blobs/sha256/{id}": b"x" * 10})
    with pytest.raises(BadLayout, match=id):
        pull(theirs, PLACE, ALL)
    assert is_empty(theirs)


def test_a_file_that_is_longer_than_it_claims_is_not_read_whole(
    theirs: Registry, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit(REPO, {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": b" " * (64 << 20)})
    hub.claimed["index.json"] = 30
    tracemalloc.start()
    with pytest.raises(OverpaintError, match=r"index.json in hf://.* at most 30 belong there"):
        pull(theirs, PLACE, ALL)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 100 << 20  # the server of this test has all of it once


def test_somebodys_own_long_card_is_left_unread(ours: Registry, hub: Hub) -> None:
    hub.commit(REPO, {"README.md": b"library_name: overpaint" + b" " * (2 << 20)})
    push(ours, PLACE, beside=lambda entries: {"README.md": b"library_name: overpaint"})
    assert len((hub.files(REPO) or {})["README.md"]) > 1 << 20


def test_a_hub_that_does_not_answer_is_one_sentence(ours: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OverpaintError, match="check the address"):
        push(ours, PLACE)


def test_only_a_repository_of_models_is_a_place_on_the_hub() -> None:
    places = (
        "hf://ada/patches",
        "hf://ada/patches@v1",
        "hf://datasets/ada",
        "hf://ada/patches/folder",
        "hf://ada",
        "s3://a/b",
        "HF://ada/patches",
    )
    assert list(map(is_hub, places)) == [True, True, False, False, False, False, True]
