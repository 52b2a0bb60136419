"""What a push to the Hub has beside the patches: a card, and LoRA files that diffusers and PEFT load as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]

import overpaint
from overpaint.patches.compose import Term, compose
from overpaint.registry.records import ResultRecord
from overpaint.workspace.workspace import Workspace
from tests.registry.sharing.hub_server import Hub
from tests.shell import Shell

REPO, PLACE = "ada/patches", "hf://ada/patches"


@pytest.fixture
def workspace(tmp_path: Path, base_folder: Path) -> Workspace:
    """With patches of a cat and of a dog, and a recipe of both."""
    workspace = overpaint.open(tmp_path / "registry")
    workspace.add_base("tiny", base_folder)
    workspace.solve_many(["cat", "dog"])
    workspace.create_recipe("safe").add_all(["cat", "dog"], 0.5)
    return workspace


def files_of(hub: Hub) -> dict[str, bytes]:
    files = hub.files(REPO)
    assert files is not None
    return files


def test_the_card_has_the_header_that_the_hub_reads_and_a_row_for_each_concept(workspace: Workspace, hub: Hub) -> None:
    workspace.solve("a | b")
    patch = workspace.registry.patch("cat")
    workspace.registry.add_evaluation(
        patch=patch.id,
        digest="d" * 64,
        suite="erasure",
        judge="clip",
        seed=3,
        settings={},
        versions={},
        seconds=1.0,
        who="ada",
        results=[ResultRecord("cat", "accuracy", 0.125, None, None, 8)],
    )
    workspace.push(PLACE, license="mit")
    _, header, text = files_of(hub)["README.md"].decode().split("---\n", 2)
    known = yaml.safe_load(header)
    assert (known["library_name"], known["license"], "base_model" in known) == ("overpaint", "mit", False)
    assert "concept-erasure" in known["tags"]
    assert f"| cat | separable | {patch.nbytes} | tiny | `{patch.id}` |" in text
    assert "| a &#124; b |" in text
    assert "| cat | erasure | cat | accuracy | 0.125 | clip | 3 |" in text
    assert "Recipes, each with its history: safe." in text
    assert "## Sharp edges" in text
    assert str(workspace.registry.folder) not in text


def test_one_recipe_is_a_lora_at_the_top_that_peft_loads(workspace: Workspace, hub: Hub, tmp_path: Path) -> None:
    from peft import PeftModel

    workspace.push(PLACE, recipes=["safe"])
    files = files_of(hub)
    for name in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).write_bytes(files[name])
    config = json.loads(files["adapter_config.json"])
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", None)
    base = workspace.base("tiny")
    composed = compose(base, [Term(record.id, workspace.patch(record.id).delta, 0.5) for record in workspace.patches()])
    pipe: Any = base.pipeline(dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(pipe.unet, str(tmp_path)).merge_and_unload()
    weights = dict(model.named_parameters())
    assert composed
    for name, wanted in composed.items():
        loaded = weights[name.removeprefix("unet/")]
        assert torch.allclose(loaded.half(), wanted, atol=2e-3), name
        assert not torch.equal(loaded.half(), base.tensor(name)), name


def test_several_recipes_have_a_folder_each(workspace: Workspace, hub: Hub) -> None:
    workspace.create_recipe("Only Dogs").add("dog")
    workspace.create_recipe("empty")
    workspace.push(PLACE)
    folders = sorted(name.rpartition("/")[0] for name in files_of(hub) if name.endswith("adapter_config.json"))
    assert folders == ["lora/001-safe", "lora/002-only-dogs"]
    assert "| `lora/002-only-dogs/` | dog at 1 |" in files_of(hub)["README.md"].decode()


def test_what_no_lora_can_hold_goes_without_one_and_is_named(
    workspace: Workspace, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from overpaint.patches.formats.exporting import NotExportable
    from overpaint.workspace import exchange

    def refuse(*arguments: object, **rest: object) -> None:
        raise NotExportable("its change is not of low rank")

    monkeypatch.setattr(exchange, "export_patches", refuse)
    warnings: list[str] = []
    sent = workspace.push(PLACE, warn=warnings.append)
    assert (len(sent.patches), warnings) == (
        2,
        ["safe goes without a LoRA for other programs: its change is not of low rank"],
    )
    assert not [name for name in files_of(hub) if name.endswith(".safetensors")]


def test_the_command_line_pushes_lists_and_pulls(
    workspace: Workspace, hub: Hub, tmp_path: Path, base_folder: Path
) -> None:
    alice, bob = Shell(Path(workspace.registry.folder)), Shell(tmp_path / "bob")
    bob.ok("base", "add", "mine", str(base_folder))
    assert "2 patches, 1 recipes" in alice.ok("push", PLACE, "--license", "mit")
    listed = json.loads(bob.ok("pull", PLACE, "--list", "--json"))
    assert [(row["what"], row["state"]) for row in listed] == [("recipe", "new"), ("patch", "new"), ("patch", "new")]
    assert json.loads(bob.ok("patch", "list", "--json")) == []
    assert [row["name"] for row in json.loads(bob.ok("search", "dog", "--remote", PLACE, "--json"))] == ["dog"]
    bob.ok("pull", PLACE, "--dry-run")
    taken = json.loads(bob.ok("pull", PLACE, "--json"))
    assert len(taken) == 3
    assert "--plain-http is for an OCI registry" in bob.fails("pull", PLACE, "--plain-http")
