"""What all tests share: a tiny base, a bucket, and a stand-in for the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from overpaint.bases.base import Base
    from tests.registry.sharing.hub_server import Hub

# Fixtures import what they need: pytest's own process, which shares tests out, would load PyTorch and diffusers for nothing.

SLOW_MODULES = """
    test_ablation test_adapter_settings test_adapters test_adding_a_solver test_api test_archives test_backup
    test_bases test_blocks test_build test_build_killed test_build_streaming test_certificates test_channels
    test_choosing test_cli test_commands test_completion test_composition_benchmark test_compression test_containers
    test_converting test_crash test_crosstalk test_duplicate_weights test_embedded_transformer test_esd
    test_evaluate_command test_examples test_exporting test_few_shot test_few_shot_embedded test_few_shot_lora
    test_fingerprints test_gc test_hostile test_hub test_image_generator test_importing test_interactive
    test_interchange test_interrupting test_judges test_layouts test_lists test_live test_live_recipes
    test_load_matrix test_mace test_maintenance test_many test_model_folders test_model_hub test_nodes test_nullspace
    test_oci_registry test_offloading test_on_ray test_other_bases test_page test_patch_file test_pictures
    test_pipelines test_places test_postgres test_preserved_prompts test_probes test_processes test_push_pull
    test_queue test_rece test_recipe_file test_recipe_history test_recipe_report test_refusals test_registry
    test_report_page test_results_page test_running test_schema test_sdd test_separable test_separable_mlp test_separation
    test_sepme test_served test_signing test_single_file test_site test_solvers_benchmark test_spm test_store_backends test_suites
    test_surgical test_tables test_tags test_teams test_text_encoder test_text_encoders test_together
    test_torch_settings test_training test_two_encoders test_uce test_uncovered_inputs test_universe test_upgrades
    test_using_with test_verify test_vocabulary test_workspace
"""
"""Test modules that train, draw, start servers or kill processes: `make test-fast` leaves them out."""
SLOW = frozenset(SLOW_MODULES.split())
LONGEST = (
    *("test_on_ray", "test_page", "test_crash", "test_processes", "test_running", "test_adding_a_solver"),
    *("test_examples", "test_blocks", "test_suites", "test_embedded_transformer", "test_interrupting"),
    *("test_build_killed", "test_other_bases", "test_pictures"),
)
"""Modules that take longest, which begin first: the last of a run should be short, or a core has nothing to do."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import slow modules for `make test-fast`: what they import takes longer than its tests."""
    return True if config.option.markexpr == "not slow" and collection_path.stem in SLOW else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest modules first, and mark as slow what SLOW_MODULES names and whatever runs on a PostgreSQL server."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for item in items:
        if item.path.stem in SLOW or "postgres" in item.nodeid:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base as a diffusers folder, fp16 as published bases are. Tests do not write into it."""
    from overpaint.testing import tiny_base

    return tiny_base(tmp_path_factory.mktemp("base") / "tiny").path


@pytest.fixture
def base(base_folder: Path) -> Base:
    """The tiny base, opened."""
    from overpaint.bases.base import Base

    return Base.open(base_folder)


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """The URL of a bucket on a real S3 server, one for the whole run: clients keep connections to the first they meet."""
    if any(find_spec(name) is None for name in ("moto", "s3fs", "flask")):
        pytest.skip('moto and s3fs are not installed; pip install -e ".[dev]" does')
    from tests.registry.s3_server import BUCKET, s3_server

    with pytest.MonkeyPatch.context() as patch, s3_server() as environment:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A stand-in for the Hugging Face Hub, which this process writes to with a token."""
    from tests.registry.sharing.hub_server import WRITER, hub_server

    with hub_server() as hub:
        for name, value in {"HF_ENDPOINT": hub.address, "HF_TOKEN": WRITER, "HOME": str(tmp_path)}.items():
            monkeypatch.setenv(name, value)
        yield hub
