"""Solving many: once each, in one universe, each stored before the next is begun, and nothing stored by mistake."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import overpaint
from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.registry.registry import ConceptDiffers
from overpaint.registry.upkeep import verify
from overpaint.solvers import SOLVERS, is_closed_form, solver_class
from overpaint.solvers.closed_form.separable import Separable
from overpaint.solvers.problem import EditProblem
from overpaint.solvers.trained.training import training_bytes
from overpaint.workspace.planning import SolveRequest, digest_of_manifest
from overpaint.workspace.solving import SolveOutcome, duration, gpu_share
from overpaint.workspace.workspace import Workspace
from tests.shell import Shell

from . import fakes

FILE = """
defaults: {solver: counting}
concepts:
  - {name: cat, synonyms: [fox]}
  - {name: dog, anchor: car}
  - sun
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "concepts.yaml"
    file.write_text(FILE)
    return file


def solved(workspace: Workspace, file: Path, *, update: bool = False, again: bool = False) -> list[SolveOutcome]:
    plan = workspace.plan(file=file, base="tiny", update=update, force=again)
    return workspace.carry_out(plan, device="cpu")


def test_all_concepts_are_one_universe_from_the_first_solve_on(workspace: Workspace, file: Path) -> None:
    solved(workspace, file)
    assert fakes.CALLS == ["cat", "dog", "sun"]
    assert fakes.UNIVERSES == [("dog", "sun"), ("cat", "sun"), ("cat", "dog")]
    assert [concept.name for concept in workspace.concepts()] == ["cat", "dog", "sun"]
    assert workspace.registry.concept("dog") == Concept("dog", anchor="car")


def test_what_was_solved_with_equal_inputs_is_not_solved_again(workspace: Workspace, file: Path) -> None:
    first = solved(workspace, file)
    again = solved(workspace, file)
    assert fakes.CALLS == ["cat", "dog", "sun"]
    assert [outcome.before for outcome in again] == [True, True, True]
    assert [outcome.record for outcome in again] == [outcome.record for outcome in first]
    assert [outcome.before for outcome in solved(workspace, file, again=True)] == [False, False, False]
    assert len(fakes.CALLS) == 6
    assert len(workspace.patches()) == 3


@pytest.mark.parametrize(
    ("old", "new", "calls"),
    [
        ("- sun", "- {name: sun, seed: 1}", ["sun"]),
        ("- sun", "- {name: sun, settings: {size: 0.5}}", ["sun"]),
        ("- sun", "- {name: sun, settings: {size: 1e-2}}", []),
        ("- sun", "- sun\n  - moon", ["cat", "dog", "sun", "moon"]),
        ("[fox]", "[fox, bus]", ["cat", "dog", "sun"]),
    ],
    ids=["a seed", "a setting", "the same setting", "one more concept", "another description"],
)
def test_what_differs_is_solved_again(workspace: Workspace, file: Path, old: str, new: str, calls: list[str]) -> None:
    """A concept that joins or changes changes the universe of all others."""
    solved(workspace, file)
    fakes.CALLS.clear()
    file.write_text(FILE.replace(old, new))
    solved(workspace, file, update=True)
    assert calls == fakes.CALLS


def test_named_and_listed_concepts_give_the_same_patches(workspace: Workspace, file: Path, tmp_path: Path) -> None:
    listed = {outcome.task.request.concept.name: outcome.record for outcome in solved(workspace, file)}
    for name, record in listed.items():
        assert record is not None
        assert workspace.solve(name, base="tiny", solver="counting", device="cpu").id == record.id


def test_a_bare_name_means_the_concept_that_is_known_by_it(workspace: Workspace, file: Path) -> None:
    workspace.add_concept("sun", synonyms=["moon"])
    solved(workspace, file)
    assert workspace.registry.concept("sun").synonyms == ("moon",)
    assert workspace.patch("sun").concept.synonyms == ("moon",)


def test_a_universe_is_stored_compactly_and_read_back_whole(workspace: Workspace, file: Path) -> None:
    record = solved(workspace, file)[2].record
    assert record is not None
    manifest = workspace.patch(record.id).manifest
    listed = manifest["solver"]["universe"]
    assert listed == [{"name": "cat", "synonyms": ["fox"]}, {"name": "dog", "anchor": "car"}]
    assert tuple(Concept.from_json(each) for each in listed) == tuple(workspace.concepts()[:2])
    in_full = {**manifest["solver"], "universe": [concept.as_json() for concept in workspace.concepts()[:2]]}
    assert digest_of_manifest({**manifest, "solver": in_full}) == digest_of_manifest(manifest), (
        "as it was written before"
    )


def test_new_pictures_are_new_inputs(workspace: Workspace, tmp_path: Path) -> None:
    folder = tmp_path / "cats"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    file = tmp_path / "concepts.yaml"
    file.write_text("[{name: cat, solver: counting, images: cats}]")
    solved(workspace, file)
    assert [outcome.before for outcome in solved(workspace, file)] == [True]
    folder.rename(tmp_path / "moved")
    file.write_text(file.read_text().replace("cats", "moved"))
    folder = tmp_path / "moved"
    assert [outcome.before for outcome in solved(workspace, file)] == [True], "what counts is what they show"
    Image.new("RGB", (8, 8), "red").save(folder / "1.png")
    assert [outcome.before for outcome in solved(workspace, file)] == [False]
    assert len(workspace.patches()) == 2


def test_a_patch_that_lost_its_bytes_is_solved_again(workspace: Workspace, file: Path) -> None:
    first = solved(workspace, file)[0].record
    assert first is not None
    workspace.registry.blobs.discard(first.id)
    assert [outcome.before for outcome in solved(workspace, file)] == [False, True, True]
    assert verify(workspace.registry).problems == ()


def test_a_known_concept_is_changed_only_when_asked(workspace: Workspace, file: Path) -> None:
    workspace.add_concept("cat", synonyms=["rose"])
    with pytest.raises(ConceptDiffers) as caught:
        solved(workspace, file)
    assert '"rose"' in str(caught.value)
    assert '"fox"' in str(caught.value)
    assert [concept.name for concept in workspace.concepts()] == ["cat"]
    assert fakes.CALLS == []
    solved(workspace, file, update=True)
    assert workspace.registry.concept("cat").synonyms == ("fox",)
    assert [patch.concept for patch in workspace.registry.search("fox").patches] == ["cat"], (
        "a search knows the new words"
    )
    assert verify(workspace.registry).problems == ()


def test_an_updated_concept_is_found_by_its_new_words_and_keeps_its_old_patches(
    workspace: Workspace, file: Path
) -> None:
    solved(workspace, file)
    workspace.registry.tag("pets", patches=["cat"], who="me")
    file.write_text(FILE.replace("[fox]", "[tree]"))
    fakes.UNSOLVABLE.update(("dog", "sun"))
    solved(workspace, file, update=True)
    assert len(workspace.patches(concept="cat")) == 2
    assert {patch.concept for patch in workspace.registry.search("tree", tag="pets").patches} == {"cat"}
    assert workspace.registry.search("fox").patches == ()


def test_nothing_is_stored_when_nothing_can_be_solved(workspace: Workspace, file: Path) -> None:
    fakes.UNSOLVABLE.update(("cat", "dog", "sun"))
    outcomes = solved(workspace, file)
    assert [outcome.error.partition(" ")[0] for outcome in outcomes] == ["cat", "dog", "sun"]
    assert workspace.concepts() == []
    assert workspace.patches() == []


def test_one_that_cannot_be_solved_does_not_stop_the_others(workspace: Workspace, file: Path) -> None:
    fakes.UNSOLVABLE.add("cat")
    assert [outcome.record is None for outcome in solved(workspace, file)] == [True, False, False]
    assert [concept.name for concept in workspace.concepts()] == ["cat", "dog", "sun"]
    fakes.UNSOLVABLE.clear()
    assert [outcome.before for outcome in solved(workspace, file)] == [False, True, True]


@pytest.mark.parametrize("at", ["cat", "dog", "sun"])
def test_an_interrupted_run_keeps_the_reported_patches_and_goes_on_there(
    workspace: Workspace, file: Path, at: str
) -> None:
    fakes.INTERRUPTED.add(at)
    told: list[SolveOutcome] = []
    plan = workspace.plan(file=file, base="tiny")
    with pytest.raises(KeyboardInterrupt):
        workspace.carry_out(plan, device="cpu", on_result=told.append)
    done = ["cat", "dog", "sun"].index(at)
    assert [patch.concept for patch in workspace.patches()] == [o.task.request.concept.name for o in told]
    assert len(told) == done
    assert (workspace.concepts() == []) == (done == 0)
    assert verify(workspace.registry).problems == ()
    fakes.reset()
    assert [outcome.before for outcome in solved(workspace, file)] == [True] * done + [False] * (3 - done)
    assert len(fakes.CALLS) == 3 - done


def test_two_runs_at_once_end_with_the_same_patches(workspace: Workspace, file: Path, tmp_path: Path) -> None:
    """Both plan before either has stored anything; the slower one finds concepts and patches there."""
    other = overpaint.open(tmp_path / "registry")
    plans = [each.plan(file=file, base="tiny") for each in (workspace, other)]
    ids = [[o.record and o.record.id for o in workspace.carry_out(plan, device="cpu")] for plan in plans]
    assert ids[0] == ids[1]
    assert len(workspace.patches()) == 3


def test_progress_shows_the_time_left(workspace: Workspace, file: Path) -> None:
    told: list[tuple[int, int, str]] = []
    plan = workspace.plan(file=file, base="tiny")
    workspace.carry_out(plan, device="cpu", progress=lambda *step: told.append(step))
    assert [step for step, _, _ in told] == [1, 1, 2, 2, 3, 3]
    assert {of for _, of, _ in told} == {3}
    assert told[1][2] == "solving cat: counting 1/2"
    assert "left" in told[-1][2]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (89, "89 s"), (100, "2 min"), (3 * 3600 + 100, "3 h 2 min")]
)
def test_durations_are_formatted_for_people(seconds: float, said: str) -> None:
    assert duration(seconds) == said


class TestCommand:
    @pytest.fixture
    def shell(self, workspace: Workspace, tmp_path: Path) -> Shell:
        return Shell(tmp_path / "registry")

    def test_the_table_shows_what_was_solved_when(self, shell: Shell, file: Path) -> None:
        rows = json.loads(shell.ok("solve", "--from", str(file), "--base", "tiny", "--json"))
        assert [(row["concept"], row["solved"]) for row in rows] == [("cat", "now"), ("dog", "now"), ("sun", "now")]
        result = shell.succeeds("solve", "--from", str(file), "--base", "tiny", "--json")
        out, err = result.stdout, result.stderr
        assert [row["solved"] for row in json.loads(out)] == ["before"] * 3
        assert "3 of 3 were solved before" in err
        assert fakes.CALLS == ["cat", "dog", "sun"]

    def test_a_dry_run_shows_everything_and_stores_nothing(
        self, shell: Shell, file: Path, workspace: Workspace
    ) -> None:
        workspace.solve(Concept("sun"), base="tiny", solver="counting", device="cpu")
        fakes.reset()
        result = shell.succeeds(
            "solve", "--from", str(file), "--base", "tiny", "--dry-run", "--compress", "2", "--json"
        )
        out, err = result.stdout, result.stderr
        rows = json.loads(out)
        assert [(row["concept"], row["in the registry"]) for row in rows] == [
            ("cat", "new"),
            ("dog", "new"),
            ("sun", "known"),
        ]
        assert {row["settings"] for row in rows} == {"compressed to rank 2"}
        assert "3 of 3 to solve, with 3 concepts in the universe" in err
        assert fakes.CALLS == []
        assert len(workspace.concepts()) == 1

    def test_failures_are_named_and_set_the_exit_code(self, shell: Shell, file: Path) -> None:
        fakes.UNSOLVABLE.add("dog")
        result = shell("solve", "--from", str(file), "--base", "tiny")
        assert result.exit_code == 1
        assert "not solved: dog: dog cannot be erased" in result.stderr
        assert "sun" in result.stdout

    def test_ctrl_c_ends_with_130_and_a_sentence(self, shell: Shell, file: Path) -> None:
        fakes.INTERRUPTED.add("dog")
        result = shell("solve", "--from", str(file), "--base", "tiny")
        assert result.exit_code == 130
        assert result.stderr.strip() == (
            "interrupted: 1 of 3 are solved and stored; run the same command again for the rest"
        )
        fakes.INTERRUPTED.add("moon")
        result = shell("solve", "moon", "--base", "tiny", "--solver", "counting")
        assert (result.exit_code, result.stderr.strip()) == (130, "interrupted: nothing was stored")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("solve", "--base", "tiny"), "name the concepts, or a file"),
            (("solve", "cat", "--from", "x.yaml", "--base", "tiny"), "name the concepts, or a file"),
            (("solve", "--from", "nothing.yaml", "--base", "tiny"), "cannot be read"),
            (("solve", "cat", "--base", "tiny", "--compress", "much"), "a rank, such as 4"),
            (("solve", "cat", "--base", "tiny", "--compress", "0"), "at least 1"),
            (("solve", "cat", "--base", "tiny", "--compress", "1.5"), "at most 1.0"),
            (("solve", "cat", "--base", "tiny", "--solver", "counting", "--set", "siez=1"), "did you mean 'size'"),
        ],
        ids=" ".join,
    )
    def test_a_mistake_stores_nothing(
        self, shell: Shell, workspace: Workspace, words: tuple[str, ...], message: str
    ) -> None:
        result = shell(*words)
        assert result.exit_code in (1, 2)
        assert message in result.stderr
        assert workspace.concepts() == []
        assert workspace.patches() == []


def test_a_concepts_own_prompts_are_used_by_the_default_solver(base: Base) -> None:
    phrases = Concept("cat", prompts=("a cat in the house by the tree",))
    plain, own = (Separable().solve(EditProblem(base, concept)).delta for concept in (Concept("cat"), phrases))
    assert plain != own


def test_settings_are_keywords_or_a_mapping_of_them(workspace: Workspace) -> None:
    by_keyword = workspace.solve_many(["cat"], base="tiny", solver="counting", device="cpu", size=0.5)
    by_mapping = workspace.solve_many(["cat"], base="tiny", solver="counting", device="cpu", settings={"size": 0.5})
    assert [outcome.before for outcome in (*by_keyword, *by_mapping)] == [False, True]


class TestSharesOfAGpu:
    """How many concepts are solved on one GPU at once."""

    @pytest.fixture
    def base(self, workspace: Workspace) -> Base:
        return workspace.base("tiny")

    def share(
        self, monkeypatch: pytest.MonkeyPatch, base: Base, memory: int, solver: str = "esd", **settings: str
    ) -> float:
        about = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
        request = SolveRequest(Concept("cat"), solver, settings, 0, ())
        return gpu_share([request], base, torch.device("cuda"))

    def test_as_many_as_its_memory_has_room_for(self, monkeypatch: pytest.MonkeyPatch, base: Base) -> None:
        needed = solver_class("esd")(batch=4).peak_bytes(base)
        assert self.share(monkeypatch, base, 4 * needed, batch="4") == 1 / 3
        assert self.share(monkeypatch, base, needed // 2, batch="4") == 1
        assert self.share(monkeypatch, base, 1000 * needed, batch="4") == 1 / 8

    def test_computing_activations_again_makes_room(self, monkeypatch: pytest.MonkeyPatch, base: Base) -> None:
        needed = solver_class("esd")(batch=4).peak_bytes(base)
        assert self.share(monkeypatch, base, 4 * needed, batch="4", checkpoint="true") < 1 / 3

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_it_is_known_of_all_that_train(self, monkeypatch: pytest.MonkeyPatch, base: Base, solver: str) -> None:
        trains = not is_closed_form(solver)
        assert (self.share(monkeypatch, base, 1 << 50, solver) < 1) == trains

    def test_patterns_count_as_what_they_match(self, base: Base) -> None:
        names = [name for name in base.names if name.startswith("unet/")]
        assert training_bytes(base, ["unet/*"], 1) == training_bytes(base, names, 1) > training_bytes(base, [], 1)

    def test_a_cpu_is_none(self, base: Base) -> None:
        assert gpu_share([], base, torch.device("cpu")) == 0
