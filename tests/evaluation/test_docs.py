"""The Python blocks of the page about evaluation say what is so."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from overpaint.bases.base import Base
from overpaint.core.concepts import Concept
from overpaint.evaluation.judges import open_judge
from overpaint.evaluation.prompts import ListedPrompts
from overpaint.evaluation.suites import SUITES

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text("utf-8")


def test_the_table_of_suites_is_that_of_the_code() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE.partition("## Suites")[2], re.MULTILINE) == [*SUITES]


def test_the_judge_of_the_page_is_one(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    module = ModuleType("page_about_evaluation")
    exec(block, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    prompts = ListedPrompts({Concept("person"): None})
    judge = open_judge(f"hook:{module.__name__}:detector", Base.open(base_folder), prompts, torch.device("cpu"))
    assert judge.name == "my detector, v1"
    assert judge.heads == {"object": ("person", "nothing")}
