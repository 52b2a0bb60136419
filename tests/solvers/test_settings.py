"""Settings: every value is checked in one place, wherever it comes from, and bad ones are answered with a whole sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from overpaint.solvers.problem import (
    BadSetting,
    EditProblem,
    OutOfMemory,
    Solution,
    Solver,
    TrainingDiverged,
    configure,
    finite,
    range_of,
    settable,
    setting,
    settings_of,
    within_memory,
)


@dataclass(frozen=True)
class Method(Solver):
    """A method with a setting of every type."""

    PRESETS = {"small": {"rank": 2, "rate": 0.5}}  # noqa: RUF012

    rank: int = setting(8, "directions", low=1, high=64)
    rate: float = setting(1e-4, "learning rate", low=0.0)
    tau: float = setting(-0.5, "any number")
    exact: bool = setting(True, "or not")
    part: str = setting("kv", "what is edited", choices=("kv", "v"))
    keep: str = setting("", "prompts")

    def solve(self, problem: EditProblem) -> Solution:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rnak": "3"}, "no setting 'rnak' (did you mean 'rank'?); it has: "),
        ({"rank": "many"}, "rank='many' is not a int; it takes between 1 and 64, for example its default, 8"),
        ({"rank": "0"}, "rank must be between 1 and 64; got 0"),
        ({"rank": "65"}, "rank must be between 1 and 64; got 65"),
        ({"rank": "2.5"}, "not a int"),
        ({"rate": "-1"}, "rate must be at least 0; got -1"),
        ({"rate": "nan"}, "rate must be at least 0; got nan"),
        ({"rate": "inf"}, "rate must be at least 0; got inf"),
        ({"tau": "nan"}, "tau must be finite; got nan"),
        ({"exact": "maybe"}, "exact='maybe' is not a bool"),
        ({"part": "k"}, "part must be one of kv, v; got k (did you mean 'kv'?)"),
        ({"preset": "smal"}, "no preset 'smal' (did you mean 'small'?); it has: "),
    ],
)
def test_a_bad_setting_is_refused_with_what_it_may_be(settings: dict[str, str], message: str) -> None:
    with pytest.raises(BadSetting) as refused:
        configure(Method, settings)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "values", [{"rank": 0}, {"rank": 2.0}, {"rank": True}, {"rate": float("nan")}, {"rate": "1"}, {"part": "q"}]
)
def test_values_are_checked_in_python_too(values: Mapping[str, Any]) -> None:
    with pytest.raises(BadSetting):
        Method(**values)


def test_a_whole_number_is_a_number_and_provenance_treats_both_alike() -> None:
    assert json.dumps(settings_of(Method(rate=1))) == json.dumps(settings_of(Method(rate=1.0)))


@given(
    rank=st.integers(1, 64),
    rate=st.floats(0, allow_infinity=False),
    tau=st.floats(allow_nan=False, allow_infinity=False),
    exact=st.booleans(),
    part=st.sampled_from(["kv", "v"]),
    keep=st.text(),
)
def test_settings_come_back_from_json_and_from_text(**values: Any) -> None:
    solver = Method(**values)
    found = json.loads(json.dumps(settings_of(solver)))
    assert Method(**found) == solver
    assert configure(Method, {name: str(value) for name, value in found.items()}) == solver


def test_a_preset_is_changed_by_what_is_set_beside_it() -> None:
    assert Method.preset("small") == Method(rank=2, rate=0.5)
    assert Method.preset("small", rank=3) == Method(rank=3, rate=0.5)
    assert configure(Method, {"preset": "small", "rate": "0.25"}) == Method(rank=2, rate=0.25)
    assert configure(Method, {}, preset="small") == Method.preset("small")


def test_ranges_are_described_in_words() -> None:
    assert {name: range_of(spec) for name, spec in settable(Method).items()} == {
        "rank": "between 1 and 64",
        "rate": "at least 0",
        "tau": "",
        "exact": "",
        "part": "one of kv, v",
        "keep": "",
    }


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_no_number_names_the_step_and_what_to_lower(loss: float) -> None:
    with pytest.raises(TrainingDiverged, match=r"at step 7.*lower lr \(0.1\)"):
        finite(loss, 7, "lr (0.1)")
    assert finite(0.5, 7, "lr") == 0.5


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_memory_that_runs_out_names_the_setting_to_lower(error: Exception) -> None:
    with pytest.raises(OutOfMemory, match="lower batch"), within_memory("batch"):
        raise error


def test_other_errors_and_interruptions_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), within_memory("batch"):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(KeyboardInterrupt), within_memory("batch"):
        raise KeyboardInterrupt
