"""Other tools' files through the registry and the command line: imported, stored, added, exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from overpaint.bases.base import Base
from overpaint.patches.compose import compose
from overpaint.testing import tiny_pipeline
from tests.shell import Shell

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def ready(tmp_path: Path, base_folder: Path) -> Shell:
    shell = Shell(tmp_path / "registry")
    shell.succeeds("init")
    shell.succeeds("base", "add", "tiny", base_folder)
    return shell


@pytest.fixture
def spm(tmp_path: Path) -> Path:
    """A LoRA of rank one on one layer, as SPM saves it."""
    key = f"lora_unet_{LAYER.replace('.', '_')}"
    tensors = {
        f"{key}.lora_down.weight": torch.full((1, 64), 0.5),
        f"{key}.lora_up.weight": torch.full((8, 1), 0.25),
        f"{key}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "cat_last.safetensors", metadata={"prompts": "cat"})
    return tmp_path / "cat_last.safetensors"


def test_an_imported_patch_is_added_built_and_removed_like_any_other(ready: Shell, spm: Path, tmp_path: Path) -> None:
    done = ready.succeeds("patch", "import", spm, "--base", "tiny", "--concept", "cat")
    assert "kohya LoRA (changes to weights, float32): matched 3 of 3 keys" in done.stderr
    assert "changes 1 tensors (unet attn2.to_k 1)" in done.stderr
    assert "bit for bit" in done.stderr
    assert "low-rank" in done.stdout
    shown = json.loads(ready.succeeds("patch", "show", "cat", "--json").stdout)
    facts = {row["what"]: row["value"] for row in shown}
    assert (facts["solver"], facts["setting dialect"], facts["setting file"]) == ("import", "kohya LoRA", spm.name)
    ready.succeeds("patch", "add", "cat", "--recipe", "safe")
    ready.succeeds("build", "safe", tmp_path / "out")
    weight = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")[f"{LAYER}.weight"]
    before = load_file(ready_base(ready) / "unet/diffusion_pytorch_model.safetensors")[f"{LAYER}.weight"]
    assert torch.equal(weight, (before.double() + 0.125).half())
    assert "bit for bit" in ready.succeeds("patch", "remove", "cat", "--recipe", "safe").stdout


def ready_base(shell: Shell) -> Path:
    return Path(json.loads(shell.succeeds("base", "list", "--json").stdout)[0]["source"])


def test_importing_twice_stores_one_patch(ready: Shell, spm: Path) -> None:
    one, two = (
        json.loads(ready.succeeds("patch", "import", spm, "--base", "tiny", "--concept", "cat", "--json").stdout)
        for _ in "12"
    )
    assert one == two
    assert one["differing"] == 0
    assert len(json.loads(ready.succeeds("patch", "list", "--json").stdout)) == 1


def test_a_file_that_does_not_fit_stores_nothing(ready: Shell, tmp_path: Path) -> None:
    save_file({"lora_unet_strange.lora_down.weight": torch.ones(1, 4)}, tmp_path / "strange.safetensors")
    message = ready.fails("patch", "import", tmp_path / "strange.safetensors", "--base", "tiny", "--concept", "cat")
    assert "none of its 1 keys" in message
    assert json.loads(ready.succeeds("patch", "list", "--json").stdout) == []
    assert json.loads(ready.succeeds("concept", "list", "--json").stdout) == []
    assert "there is no file or folder" in ready.fails("patch", "import", "gone", "--base", "tiny", "--concept", "cat")


def test_patches_of_every_origin_are_exported_together(ready: Shell, spm: Path, tmp_path: Path) -> None:
    ready.succeeds("patch", "import", spm, "--base", "tiny", "--concept", "cat")
    ready.succeeds("solve", "dog", "--base", "tiny")
    ready.succeeds("patch", "add", "cat", "dog", "--recipe", "safe", "--why", "takedown")
    done = ready.succeeds("recipe", "export", "safe", "-o", tmp_path / "safe.safetensors")
    assert "exact but for the rounding of float32 (max relative error" in done.stdout
    ready.succeeds("patch", "import", tmp_path / "safe.safetensors", "--base", "tiny", "--concept", "pets")
    import overpaint

    workspace = overpaint.open(ready.registry)
    wanted = compose(workspace.base("tiny"), workspace.recipe("safe").terms())
    workspace.create_recipe("again", base="tiny", exist_ok=True).add("pets")
    found = compose(workspace.base("tiny"), workspace.recipe("again").terms())
    assert found.keys() == wanted.keys()
    # One unit in the last place of float16 where the sum lies at the border between two values.
    assert all(torch.allclose(found[name], wanted[name], rtol=2**-10, atol=2**-24) for name in wanted)


def test_an_approximate_export_prints_the_error_of_each_layer(ready: Shell, spm: Path, tmp_path: Path) -> None:
    ready.succeeds("patch", "import", spm, "--base", "tiny", "--concept", "cat")
    ready.succeeds("solve", "dog", "--base", "tiny")
    out = tmp_path / "half.safetensors"
    done = ready.succeeds("patch", "export", "dog", "cat", "--dtype", "float16", "-o", out)
    assert "approximate (max relative error" in done.stdout
    assert f"unet/{LAYER}.weight" in done.stderr
    told = json.loads(ready.succeeds("patch", "export", "dog", "-o", tmp_path / "1.safetensors", "--json").stdout)
    assert (told["exact"], told["format"], set(told["errors"])) == (True, "kohya", set(told["errors"]))
    assert "already there" in ready.fails("patch", "export", "dog", "-o", out)
    assert "no patch" in ready.fails("patch", "export", "nobody", "-o", tmp_path / "2.safetensors").lower()


def test_patches_of_two_bases_are_not_put_into_one_file(ready: Shell, spm: Path, tmp_path: Path) -> None:
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    ready.succeeds("base", "add", "other", tmp_path / "other")
    ready.succeeds("patch", "import", spm, "--base", "tiny", "--concept", "cat")
    ready.succeeds("patch", "import", spm, "--base", "other", "--concept", "dog")
    assert "one file is for one base" in ready.fails("patch", "export", "cat", "dog", "-o", tmp_path / "x.safetensors")


def test_full_weights_are_what_a_build_holds(ready: Shell, spm: Path, tmp_path: Path) -> None:
    ready.succeeds("patch", "import", spm, "--base", "tiny", "--concept", "cat")
    ready.succeeds("patch", "add", "cat", "--recipe", "safe")
    ready.succeeds("recipe", "export", "safe", "--format", "full", "-o", tmp_path / "w.safetensors")
    ready.succeeds("build", "safe", tmp_path / "out")
    built = Base.open(tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "w.safetensors")[f"{LAYER}.weight"], built.tensor(f"unet/{LAYER}.weight"))


def test_the_two_imports_and_exports_point_at_each_other(ready: Shell) -> None:
    for words in (("patch", "import"), ("patch", "export"), ("recipe", "export")):
        assert "overpaint" in ready.succeeds(*words, "--help").stdout
