"""A registry with a tiny base, patches and recipes, and the server of it in this process."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image

import overpaint
from overpaint.serving.access import Role, ServeOptions, TokenFile
from overpaint.serving.app import Server, create_app
from overpaint.workspace.workspace import Workspace

THINGS = ("cat", "dog", "fox", "car")
RECIPES: dict[str, dict[str, float]] = {
    "plain": {},
    "cat": {"cat": 1.0},
    "dog": {"dog": 1.0},
    "half": {"cat": 0.5},
    "both": {"cat": 1.0, "dog": 1.0},
    "fox": {"fox": 1.0},
    "turned": {"fox": -1.0},
    "three": {"cat": 1.0, "dog": 1.0, "fox": 1.0},
    "mixed": {"cat": 0.25, "car": 1.5},
    "all": {"cat": 1.0, "dog": 1.0, "fox": 1.0, "car": 1.0},
}
"""Ten recipes; strengths by concept."""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """A registry with the tiny base, patches of THINGS and RECIPES. Tests work on copies."""
    workspace = overpaint.open(tmp_path_factory.mktemp("served") / "registry")
    workspace.add_base("tiny", base_folder)
    for thing in THINGS:
        workspace.solve(thing)
    for name, strengths in RECIPES.items():
        recipe = workspace.create_recipe(name)
        for thing, strength in strengths.items():
            recipe.add(thing, strength)
    return workspace.registry.folder


@pytest.fixture
def workspace(tmp_path: Path, made: Path) -> Workspace:
    """A copy of that registry."""
    return overpaint.open(shutil.copytree(made, tmp_path / "registry"))


@dataclass
class Client:
    """A caller of a server in this process, with a token of one role."""

    http: TestClient
    headers: dict[str, str]

    @property
    def server(self) -> Server:
        """The server itself."""
        app: Any = self.http.app
        server: Server = app.state.server
        return server

    def get(self, path: str, **query: Any) -> Any:
        return self.http.get(path, params=query, headers=self.headers)

    def post(self, path: str, **body: Any) -> Any:
        return self.http.post(path, json=body, headers=self.headers)

    def picture(self, recipe: str, seed: int = 0, **more: Any) -> Any:
        """One picture in one step."""
        return self.post("/v1/generate", recipe=recipe, prompt="a photo of the cat", seed=seed, steps=1, **more)


def pixels(content: bytes) -> NDArray[np.uint8]:
    """The pixels of a PNG file."""
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture.convert("RGB"))


def texts(content: bytes) -> tuple[str, dict[str, Any]]:
    """The digest of the weights that a PNG file states, and what else it states."""
    with Image.open(io.BytesIO(content)) as picture:
        return picture.info["overpaint:weights"], json.loads(picture.info["overpaint"])


Serve = Callable[..., Client]


@pytest.fixture
def serve(workspace: Workspace) -> Iterator[Serve]:
    """Starts a server of the registry; `role` is that of the caller's token, other keywords are ServeOptions."""
    with ExitStack() as running:

        def start(role: Role = "change", owner: str = "Ada", recipes: tuple[str, ...] = (), **options: Any) -> Client:
            folder = workspace.registry.folder
            token = TokenFile(folder).add(owner, role, recipes)
            app = create_app(replace(ServeOptions(str(folder), device="cpu"), **options))
            http = running.enter_context(TestClient(app, "http://127.0.0.1", raise_server_exceptions=False))
            return Client(http, {"Authorization": f"Bearer {token}"})

        yield start


def as_role(client: Client, role: Role, owner: str = "Bob", recipes: tuple[str, ...] = ()) -> Client:
    """Another caller of the same server."""
    token = client.server.tokens.add(owner, role, recipes)
    return Client(client.http, {"Authorization": f"Bearer {token}"})
