"""Bases on the Hub, with a stand-in for the Hub: a folder of repositories, laid out in the cache as the real one is."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from click.testing import CliRunner
from diffusers import DiffusionPipeline
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError
from transformers import CLIPConfig

from overpaint.bases.base import Base, BrokenBase
from overpaint.bases.hub import HubId, snapshot
from overpaint.bases.layout import UnknownLayout
from overpaint.cli import main
from overpaint.core.errors import NotFound, OverpaintError
from overpaint.patches.build import build
from overpaint.registry.registry import Registry
from overpaint.workspace.workspace import Workspace
from tests.checkpoints import rename_weights, shard

ID = "somebody/tiny-model"
COMMITS = ("0" * 40, "1" * 40)


def not_found() -> RepositoryNotFoundError:
    return RepositoryNotFoundError.__new__(RepositoryNotFoundError)


@dataclass
class Hub:
    """What stands in for the Hub: `commits` of one model, the newest last, and a cache of links to blobs."""

    cache: Path
    commits: dict[str, Path] = field(default_factory=dict)
    online: bool = True
    asked: int = 0
    downloaded: list[str] = field(default_factory=list)

    def _commit(self, repository: str, revision: str | None) -> str:
        if repository != ID or (revision not in (None, "main") and revision not in self.commits):
            raise not_found()
        return revision if revision in self.commits else list(self.commits)[-1]

    def model_info(self, repository: str, *, revision: str | None = None) -> Any:
        self.asked += 1
        if not self.online:
            raise OfflineModeIsEnabled("offline mode is on")
        commit = self._commit(repository, revision)
        found = sorted(p.relative_to(self.commits[commit]) for p in self.commits[commit].rglob("*") if p.is_file())
        return SimpleNamespace(sha=commit, siblings=[SimpleNamespace(rfilename=name.as_posix()) for name in found])

    def snapshot_download(
        self,
        repository: str,
        *,
        revision: str | None = None,
        allow_patterns: list[str] | None = None,
        local_files_only: bool = False,
    ) -> str:
        root = self.cache / f"models--{repository.replace('/', '--')}"
        if local_files_only or not self.online:
            ref = root / "refs" / (revision or "main")
            folder = root / "snapshots" / (ref.read_text() if ref.is_file() else revision or "")
            if not folder.is_dir() or folder == root / "snapshots":
                raise LocalEntryNotFoundError("not in the cache")
            return str(folder)
        commit = self._commit(repository, revision)
        source, folder = self.commits[commit], root / "snapshots" / commit
        for file in sorted(p for p in source.rglob("*") if p.is_file()):
            name = file.relative_to(source).as_posix()
            if allow_patterns is None or any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                self._link(file, root / "blobs" / f"{commit}-{name.replace('/', '-')}", folder / name)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs/main").write_text(commit)
        return str(folder)

    def _link(self, file: Path, blob: Path, link: Path) -> None:
        if not link.exists():
            for parent in (blob.parent, link.parent):
                parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, blob)
            link.symlink_to(blob)
            self.downloaded.append(link.name)

    def hf_hub_download(self, repository: str, name: str, *, revision: str | None = None) -> str:
        return str(Path(self.snapshot_download(repository, revision=revision, allow_patterns=[name])) / name)


@pytest.fixture
def hub(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """One model of one commit."""
    found = Hub(tmp_path / "cache")
    shutil.copytree(base_folder, tmp_path / "first")
    found.commits[COMMITS[0]] = tmp_path / "first"
    for name in ("model_info", "snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(found, name))
    return found


def newer(hub: Hub, change: Callable[[Path], object] = lambda folder: None) -> Path:
    """A second commit of the model."""
    folder = shutil.copytree(hub.commits[COMMITS[0]], hub.cache.parent / "second")
    change(folder)
    hub.commits[COMMITS[1]] = folder
    return folder


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("org/model", HubId("org/model", "main")),
        ("org/model.v1-5_x@refs/pr/7", HubId("org/model.v1-5_x", "refs/pr/7")),
        (f"org/model@{COMMITS[0]}", HubId("org/model", COMMITS[0])),
        ("emoji", None),
        ("/org/model", None),
        ("./model", None),
        ("~/model", None),
        ("../model", None),
        ("org/../model", None),
        ("org/model@", None),
        ("org/model@../x", None),
        ("org/model/file", None),
        ("org--x/model", None),
        ("", None),
    ],
)
def test_only_an_id_is_taken_for_one(text: str, found: HubId | None) -> None:
    assert HubId.parse(text) == found


def test_a_model_on_the_hub_is_the_base_it_holds(base: Base, hub: Hub, tmp_path: Path) -> None:
    found = Base.open(ID)
    assert (found.fingerprint, found.layout) == (base.fingerprint, base.layout)
    assert found.hub == HubId(ID, COMMITS[0])
    assert found.source == f"{ID}@{COMMITS[0]}"
    assert build(found, [], tmp_path / "built").digest == base.fingerprint
    assert not any(path.is_symlink() for path in (tmp_path / "built").rglob("*"))


def test_a_revision_is_remembered_as_its_commit_and_stays_what_it_was(base: Base, hub: Hub, tmp_path: Path) -> None:
    workspace = Workspace(Registry.open(tmp_path / "registry"))
    record = workspace.add_base("mine", f"{ID}@main")
    assert str(record.source) == f"{ID}@{COMMITS[0]}"
    newer(hub, lambda folder: shutil.rmtree(folder / "unet"))
    again = Workspace(Registry.open(tmp_path / "registry")).base("mine")
    assert again.fingerprint == record.fingerprint == base.fingerprint
    assert again.hub == HubId(ID, COMMITS[0])


def test_a_commit_that_is_in_the_cache_needs_no_network(base: Base, hub: Hub) -> None:
    Base.open(ID)
    hub.asked, hub.online = 0, False
    assert Base.open(f"{ID}@{COMMITS[0]}").fingerprint == base.fingerprint
    assert hub.asked == 0


def test_offline_a_branch_is_what_the_cache_has(base: Base, hub: Hub) -> None:
    Base.open(ID)
    newer(hub)
    hub.online = False
    assert Base.open(ID).hub == HubId(ID, COMMITS[0])
    hub.online = True
    assert Base.open(ID).hub == HubId(ID, COMMITS[1])


def test_offline_without_a_copy_is_refused_with_the_reason(hub: Hub) -> None:
    hub.online = False
    with pytest.raises(NotFound, match=r"is not in the Hub's cache.*offline mode is on.*go online once"):
        Base.open(ID)


def test_a_cache_that_has_a_part_is_completed(base: Base, hub: Hub) -> None:
    """Another program may have fetched the configuration alone."""
    huggingface_hub.snapshot_download(ID, revision=COMMITS[0], allow_patterns=["*.json"])
    assert Base.open(f"{ID}@{COMMITS[0]}").fingerprint == base.fingerprint


def test_nothing_is_downloaded_that_a_base_does_not_need(base: Base, hub: Hub) -> None:
    folder = newer(hub)
    for name in ("tiny.ckpt", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors"):
        shutil.copyfile(folder / "unet/diffusion_pytorch_model.safetensors", folder / name)
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/model.safetensors").write_bytes(b"large")
    (folder / "grid.png").write_bytes(b"\x89PNG")
    assert Base.open(ID).fingerprint == base.fingerprint
    assert sorted(name for name in hub.downloaded if not name.endswith((".json", ".txt", ".md"))) == [
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "model.safetensors",
    ]


def test_what_is_built_of_it_loads_without_the_safety_checker(hub: Hub, tmp_path: Path) -> None:
    """Whose configuration alone is downloaded."""
    folder = newer(hub)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    CLIPConfig().save_pretrained(folder / "safety_checker")
    (folder / "safety_checker/model.safetensors").write_bytes(b"large")
    base = Base.open(ID)
    assert base.pipeline().safety_checker is None
    built = build(base, [], tmp_path / "built")
    assert built.left_out == ("safety_checker",)
    assert DiffusionPipeline.from_pretrained(built.path).safety_checker is None


@pytest.mark.parametrize("form", ["variant", "shards", "shards of a variant"])
def test_variants_and_shards_are_found_in_the_listing(base: Base, hub: Hub, form: str) -> None:
    folder = newer(hub)
    if "variant" in form:
        rename_weights(folder, "fp16")
    if "shards" in form:
        shard(folder, "unet", 3, ".fp16" if "variant" in form else "")
    found = Base.open(ID)
    assert (found.fingerprint, found.variant) == (base.fingerprint, "fp16" if "variant" in form else None)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), BrokenBase, "has no model_index.json"),
        (
            lambda folder: (folder / "model_index.json").write_text(json.dumps({"_class_name": "MarigoldPipeline"})),
            UnknownLayout,
            r"holds a MarigoldPipeline.*known are: .*StableDiffusionPipeline.*adding-a-layout",
        ),
        (
            lambda folder: (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/x.bin"),
            BrokenBase,
            r"has no unet/diffusion_pytorch_model\.safetensors",
        ),
    ],
)
def test_what_is_no_base_is_refused_before_any_weights_come(
    hub: Hub, change: Callable[[Path], object], error: type[OverpaintError], message: str
) -> None:
    newer(hub, change)
    with pytest.raises(error, match=message):
        Base.open(ID)
    assert not any(name.endswith(".safetensors") for name in hub.downloaded)


def test_a_name_that_is_nowhere_is_one_sentence(hub: Hub) -> None:
    with pytest.raises(NotFound, match="neither a folder here nor a model and revision on the Hub"):
        snapshot(HubId("somebody/else"))
    with pytest.raises(NotFound, match="@nowhere is neither"):
        snapshot(HubId(ID, "nowhere"))


def test_a_download_that_breaks_off_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> str:
        raise ConnectionError("reset\nby peer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(OverpaintError, match=r"could not be downloaded \(reset\); try again"):
        Base.open(ID)


def test_a_folder_of_that_name_comes_first(
    hub: Hub, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base_folder, tmp_path / ID)
    monkeypatch.chdir(tmp_path)
    assert Base.open(ID).path == tmp_path / ID
    assert hub.asked == 0


def test_the_command_shows_the_commit(hub: Hub, tmp_path: Path) -> None:
    words = ["--registry", str(tmp_path / "registry"), "base"]
    shown = CliRunner().invoke(main, [*words, "add", "mine", ID], catch_exceptions=False)
    assert (shown.exit_code, f"{ID}@{COMMITS[0]}" in shown.stdout) == (0, True)
    told = json.loads(CliRunner().invoke(main, [*words, "show", "mine", "--json"], catch_exceptions=False).stdout)
    values = {row["what"]: row["value"] for row in told}
    assert values["source"] == f"{ID}@{COMMITS[0]}"
    assert COMMITS[0] in values["kept at"]
    listed = json.loads(CliRunner().invoke(main, [*words, "list", "--json"], catch_exceptions=False).stdout)
    assert [row["source"] for row in listed] == [f"{ID}@{COMMITS[0]}"]
