"""The layout of docs/adding-a-layout.md is read; in their places in overpaint/bases/, the two files make a base of it."""

import json
from pathlib import Path

import overpaint
from overpaint.bases.layout import Layout

HERE = Path(__file__).parent


def test_the_layout_names_its_components_and_what_reads_the_prompt() -> None:
    written = json.loads((HERE / "example.json").read_text("utf-8"))
    layout = Layout.from_json({**written, "single_files": []})  # whose spellings are looked for in the package
    assert set(layout.components) == {"text_encoder", "unet"}
    assert layout.text_inputs["text_encoder"].projections == ("unet/*.to_k.weight", "unet/*.to_v.weight")


def test_every_spelling_that_it_names_is_there() -> None:
    layout = json.loads((HERE / "example.json").read_text("utf-8"))
    (form,) = layout["single_files"]
    named = {component["spelling"] for component in form["components"].values()}
    shipped = {file.stem for file in (Path(overpaint.__file__).parent / "bases" / "spellings").glob("*.json")}
    assert named <= shipped | {file.stem for file in HERE.glob("*.json")}
