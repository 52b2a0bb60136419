"""The claims of abstracts: regions and changes are what they say, jobs are kept one by one, and one command runs everything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import all as everything
from benchmarks import claims, until
from benchmarks.cells import BASE, Budget, BudgetSpent, Cell, Job, Verdict
from benchmarks.claims import ALTERNATIVES, change_in, measured_claims, object_region, pairs, run
from benchmarks.protocol import SEEN, Counts, chosen, questions
from benchmarks.solvers import Asked
from benchmarks.solvers_page import solvers_page
from benchmarks.until import Stop
from overpaint.core.concepts import Concept
from overpaint.core.errors import OverpaintError
from overpaint.evaluation.metrics import Measurement
from overpaint.evaluation.prompts import catalogue


def picture(colour: int = 200) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A square of another colour in the middle of a plain background."""
    found = np.full((1, 20, 20, 3), colour, np.uint8)
    found[:, 8:12, 8:12] = 20
    return found


def test_the_object_is_what_is_not_the_borders_colour_and_a_margin() -> None:
    region = object_region(picture())[0]
    assert region[6:14, 6:14].all()
    assert region.sum() == 64
    assert not object_region(np.full((1, 20, 20, 3), 90, np.uint8)).any()


def test_a_change_is_told_apart_by_where_it_is() -> None:
    before, after = picture(), picture()
    after[:, 9:11, 9:11] += 10
    region = object_region(before)
    assert change_in(before, after, ~region)[0] == 0
    assert change_in(before, after, region)[0] == pytest.approx((4 * 100 / 64) ** 0.5)
    assert change_in(before, before, np.zeros_like(region))[0] == 0


def test_every_anchor_is_an_object_of_the_base() -> None:
    assert pairs()
    assert len(set(ALTERNATIVES)) == len(ALTERNATIVES)


def numbers(subject: str) -> list[Measurement]:
    return [
        Measurement(subject, "concept still seen", 0.1, 40, 0.0, 0.2),
        Measurement(subject, "change outside", 3.0, 40),
    ]


def test_jobs_are_kept_one_by_one_and_not_done_again(tmp_path: Path) -> None:
    done: list[str] = []
    bench: Any = SimpleNamespace(drawn="20 steps", device=torch.device("cpu"))

    def job(opened: object, name: str) -> list[Measurement]:
        done.append(name)
        if name == "b":
            raise OverpaintError("no room")
        return numbers(name)

    every = [Job(f"alternative-{name}", job, (name,)) for name in "abc"]
    assert run(bench, tmp_path, every, 40) == {"alternative-b": "no room"}
    assert run(bench, tmp_path, every, 40) == {"alternative-b": "no room"}
    assert done == ["a", "b", "c", "b"]
    assert measured_claims(tmp_path) == {f"alternative-{name}": numbers(name) for name in "ac"}
    with pytest.raises(BudgetSpent):
        run(bench, tmp_path, every, 80, budget=Budget(1.0, began=0.0))
    verdicts = {SEEN: (Verdict("a cat", 1, True),)}
    page = solvers_page([Cell(BASE, "cat", "object", {}, {}, verdicts)], {}, measured_claims(tmp_path))
    assert "| a | 10.0% (0.0% to 20.0%, n=40) | 3.0 (3.0 to 3.0, n=40) |" in page


def test_what_was_found_with_other_settings_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    bench: Any = SimpleNamespace(drawn="20 steps", device=torch.device("cpu"))

    def job(opened: object, name: str) -> list[Measurement]:
        done.append(name)
        return numbers(name)

    for solver in ("sepme", "sepme", "sepme:balance=0"):
        monkeypatch.setattr(claims, "SEQUENCED", solver)
        assert run(bench, tmp_path, [Job("increments", job, ("x",))], 40) == {}
    assert done == ["x", "x"]


def test_one_command_runs_every_part_with_what_is_left_of_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(
        everything, "PARTS", {name: lambda given, name=name: ran.append([name, *given]) for name in everything.PARTS}
    )
    everything.main(["--budget", "100", "--n", "40", "--shard", "1/2", "--work", str(tmp_path)])
    assert [each[0] for each in ran] == ["solvers", "composition", "claims", "evaluation"]
    for each in ran:
        assert each[each.index("--n") + 1] == "40"
        assert each[each.index("--shard") + 1] == "1/2"
        assert 0 < float(each[each.index("--budget") + 1]) <= 100
    assert {each[each.index("--work") + 1] for each in ran} == {str(tmp_path / "solvers"), str(tmp_path / "evaluation")}
    assert "few_shot_lora:pictures=5" in ran[0]


def test_counts_make_as_many_in_every_cell() -> None:
    for name, kind in (("cat", 8), ("ink", 3), ("cat in ink style", 3)):
        asked = questions(name, Counts.at_least(100, name))
        assert all(kind * len(some) >= 100 for group, some in asked.items() if group != "synonyms" or name == "cat")


def test_names_that_a_catalogue_lacks_are_made_up_for() -> None:
    assert chosen(("cat", "unicorn", "car"), ("bus", "car", "cat", "dog")) == ("cat", "car", "bus")
    assert set(chosen(("nothing",), catalogue().objects)) <= set(catalogue().objects)


def test_a_solver_may_be_decoupled_and_says_from_what() -> None:
    asked = Asked.parse("uce:rank=2+decoupled")
    assert (asked.name, asked.decoupled, asked.settings["decoupled"]) == ("uce", "ridge", "ridge")
    told = asked.origin((), apart=(Concept("dog"),))["decoupled"]
    assert [each["name"] for each in told["universe"]] == ["dog"]
    assert "decoupled" not in Asked.parse("uce").origin(())
    with pytest.raises(OverpaintError, match=r"\+decoupled, \+exact or nothing"):
        Asked.parse("uce+wholly")


@pytest.mark.parametrize("solver", until.SOLVERS)
def test_every_solver_that_trains_may_stop_by_what_is_left(solver: str) -> None:
    preset, early = (Asked.parse(Stop(solver, value).text).settings for value in (1.0, 0.1))
    assert (early["until"], early["steps"]) == (0.1, round(4 * preset["steps"]))
    assert early["lr"] == preset["lr"]
