"""What stands beside a base's weights, damaged: every wrong value is one sentence that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from overpaint.bases.base import EMBEDDED_BASES
from overpaint.bases.layout import read_extras
from overpaint.core.errors import OverpaintError
from overpaint.evaluation.images import Sampler
from overpaint.evaluation.judges import load_judge
from overpaint.evaluation.prompts import catalogue

FOLDER = EMBEDDED_BASES["emoji-dit"]


@pytest.mark.parametrize(
    "damage",
    [
        {"guidance": "3"},
        {"guidance": True},
        {"guidance": 10**400},
        {"prompt_length": 0},
        {"prompt_length": "20"},
        {"prompt_length": 1e3},
        {"prompt_length": 10**9},
        {"size": -64},
        {"size": [64, 64]},
        {"sentences": []},
        {"sentences": {"object": []}},
        {"sentences": {"object": ["a {}"]}},
        {"sentences": {"object": [["a cat", ""]]}},
        {"sentences": {"style": [["{} {}", ""]]}},
        {"sentences": {"neutral": "{}"}},
        {"sentences": {"neutral": ["{0:>999999999}"]}},
        [],
        "",
    ],
)
def test_what_a_base_declares_is_checked_when_it_is_read(tmp_path: Path, damage: Any) -> None:
    (tmp_path / "overpaint.json").write_text(json.dumps(damage))
    with pytest.raises(OverpaintError, match=r"overpaint\.json cannot be used \(.*\); mend it, or get the base again"):
        read_extras(tmp_path)


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "overpaint.json").write_bytes(b"\xff{")
    with pytest.raises(OverpaintError, match=r"overpaint\.json cannot be used"):
        read_extras(tmp_path)


@pytest.mark.parametrize("base", EMBEDDED_BASES)
def test_what_the_embedded_bases_declare_passes(base: str) -> None:
    assert read_extras(EMBEDDED_BASES[base])["guidance"] == 3.0


@pytest.mark.parametrize("key", ["objects", "styles", "backgrounds", "templates", "held_out_templates"])
@pytest.mark.parametrize("damage", [None, 5, "clay", {"object": ["{o:>999999999}"]}, {"": {}}])
def test_a_damaged_catalogue_is_refused(tmp_path: Path, key: str, damage: Any) -> None:
    whole = json.loads((FOLDER / "catalogue.json").read_text("utf-8"))
    for name, content in (("other", {**whole, key: damage}), ("missing", {k: v for k, v in whole.items() if k != key})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "catalogue.json").write_text(json.dumps(content))
        if key in ("styles", "backgrounds") and isinstance(damage, dict) and name == "other":
            continue  # the keys of an object are a list of texts
        with pytest.raises(OverpaintError, match=r"catalogue\.json cannot be used"):
            catalogue(tmp_path / name)


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"object": 5}', b'{"object": ["cat"]}'])
def test_a_damaged_judge_is_refused(tmp_path: Path, damage: bytes) -> None:
    shutil.copytree(FOLDER / "judge", tmp_path / "judge")
    (tmp_path / "judge" / "judge.json").write_bytes(damage)
    with pytest.raises(OverpaintError, match=r"the judge in .* cannot be used"):
        load_judge(tmp_path)


@pytest.mark.parametrize("length", [0, -1, 2.5, "20"])
def test_a_sampler_reads_a_whole_number_of_tokens(length: Any) -> None:
    with pytest.raises(OverpaintError, match=r"a prompt is read for at least one token"):
        Sampler(prompt_length=length)
