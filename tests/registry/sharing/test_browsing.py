"""What a place has is seen before anything is taken: signed by whom, for which base, how large, what it would change."""

from __future__ import annotations

from pathlib import Path

import pytest

from overpaint.registry import Registry
from overpaint.registry.history import HistoriesDiverged
from overpaint.registry.sharing.ingest import BadFileKind, Listed, MissingBase, PullRequest, browse, pull, would_change
from overpaint.registry.sharing.sending import export, push
from overpaint.registry.sharing.signing import SEEN, Untrusted, key_id, load_keyring, load_signer, new_key
from tests.registry.contents import lay

from .conftest import FINGERPRINT, is_empty, labelled

ALL = PullRequest()


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "shared")


def states(listed: list[Listed]) -> list[str]:
    return [each.state for each in listed]


def test_a_place_is_listed_with_sizes_bases_and_states(ours: Registry, theirs: Registry, place: str) -> None:
    push(ours, place)
    listed = browse(theirs, place, ALL)
    recipe, *patches = listed
    assert (recipe.what, recipe.name, recipe.base, recipe.kind, recipe.state) == (
        "recipe",
        "safe",
        "mine",
        "4 revisions",
        "new",
    )
    assert [(each.id, each.name, each.base, each.solver, each.state) for each in patches] == [
        (record.id, record.concept, "mine", "uce", "new") for record in sorted(ours.patches(), key=lambda each: each.id)
    ]
    assert all(0 < each.missing < each.nbytes < len(labelled("one")) + 2000 for each in patches)
    assert "3 of 3 patches would be new" in would_change(listed)
    assert is_empty(theirs)


def test_what_a_pull_would_read_is_what_it_reads(ours: Registry, theirs: Registry, place: str) -> None:
    first, second, _ = (record.id for record in ours.patches())
    push(ours, place)
    pull(theirs, place, PullRequest(patches=[first]))
    listed = browse(theirs, place, PullRequest(patches=[second]), strict=True)
    assert [each.missing for each in listed] == [pull(theirs, place, PullRequest(patches=[second])).nbytes]
    assert states(browse(theirs, place, PullRequest(patches=[second]))) == ["known"]


def test_the_state_of_a_recipe_is_what_would_become_of_it(ours: Registry, theirs: Registry, place: str) -> None:
    push(ours, place)
    pull(theirs, place, ALL)
    assert states(browse(theirs, place, ALL))[0] == "the same"
    lay(ours, "safe", ours.patches()[2].id, 1.0)
    push(ours, place)
    assert states(browse(theirs, place, ALL))[0] == "updated"
    lay(theirs, "safe", theirs.patches()[2].id, 2.0)
    assert states(browse(theirs, place, ALL))[0] == "diverged"
    with pytest.raises(HistoriesDiverged):
        browse(theirs, place, ALL, strict=True)


def test_a_base_that_is_not_here_is_named_and_a_dry_run_refuses_it(ours: Registry, place: str, tmp_path: Path) -> None:
    push(ours, place)
    nobody = Registry.open(tmp_path / "nobody")
    assert {(each.base, each.state) for each in browse(nobody, place, ALL)} == {(FINGERPRINT, "needs its base")}
    with pytest.raises(MissingBase):
        browse(nobody, place, ALL, strict=True)


def test_signers_are_those_whose_signature_fits(ours: Registry, theirs: Registry, place: str, tmp_path: Path) -> None:
    public = {name: new_key(tmp_path / name) for name in ("alice", "bob")}
    first, *_ = (record.id for record in ours.patches())
    push(ours, place, signer=load_signer(tmp_path / "alice"))
    push(ours, place, patches=[first], signer=load_signer(tmp_path / "bob"))
    by_id = {each.id: set(each.signed_by) for each in browse(theirs, place, ALL) if each.what == "patch"}
    assert by_id.pop(first) == {key_id(public["alice"]), key_id(public["bob"])}
    assert set(map(frozenset, by_id.values())) == {frozenset({key_id(public["alice"])})}
    bobs = load_keyring([tmp_path / "bob.pub"])
    assert len(browse(theirs, place, PullRequest(patches=[first], trusted=bobs))) == 1
    with pytest.raises(Untrusted):
        browse(theirs, place, PullRequest(trusted=bobs))
    assert not (theirs.folder / SEEN).exists(), "looking writes nothing"


def test_an_archive_can_be_browsed_and_a_bare_patch_file_cannot(
    ours: Registry, theirs: Registry, tmp_path: Path
) -> None:
    export(ours, tmp_path / "all.overpaint")
    assert len(browse(theirs, tmp_path / "all.overpaint", ALL)) == 4
    (tmp_path / "patch").write_bytes(labelled("one"))
    with pytest.raises(BadFileKind, match="overpaint import"):
        browse(theirs, tmp_path / "patch", ALL)


def test_words_are_looked_for_in_names_solvers_and_reasons(ours: Registry, theirs: Registry, place: str) -> None:
    push(ours, place)
    listed = browse(theirs, place, ALL)
    assert [each.name for each in listed if each.mentions("PLUM uce")] == ["plum"]
    assert [each.what for each in listed if each.mentions("a test")] == ["recipe"]
