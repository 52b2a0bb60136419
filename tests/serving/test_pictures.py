"""Pictures: under the recipe that was asked for, as it is when drawing begins, and saying so."""

from __future__ import annotations

import asyncio
import base64
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray

import overpaint
from overpaint.evaluation.images import Sampler, generate
from overpaint.serving import drawing
from overpaint.serving.access import ServeOptions
from overpaint.serving.app import create_app
from overpaint.testing import tiny_base
from overpaint.workspace.workspace import Workspace
from tests.serving.conftest import RECIPES, Client, Serve, pixels, texts

pytestmark = pytest.mark.slow

PROMPT = "a photo of the cat"


def drawn_alone(workspace: Workspace, recipe: str, *seeds: int, pipe: Any = None) -> list[NDArray[np.uint8]]:
    """What a pipeline that carries the recipe draws, without any server."""
    pipe = workspace.recipe(recipe).apply(pipe or workspace.base("tiny").pipeline())
    return [generate(pipe, [PROMPT], [seed], Sampler(1, 7.5, 1))[0] for seed in seeds]


def test_a_picture_is_that_of_its_recipe_and_says_which_weights_drew_it(serve: Serve, workspace: Workspace) -> None:
    client = serve("generate")
    answer = client.picture("both", seed=3)
    assert answer.headers["content-type"] == "image/png"
    digest, said = texts(answer.content)
    assert answer.headers["X-Overpaint-Weights"] == digest == workspace.recipe("both").digest()
    assert answer.headers["X-Overpaint-Revision"] == "2"
    assert (said["recipe"], said["revision"], said["seed"], said["steps"]) == ("both", 2, 3, 1)
    assert said["patches"] == dict(workspace.recipe("both").record.patches)
    assert np.array_equal(pixels(answer.content), drawn_alone(workspace, "both", 3)[0])


def test_a_request_may_name_a_revision_or_patches_with_strengths(serve: Serve, workspace: Workspace) -> None:
    client = serve("generate")
    then = client.picture("both@1")
    assert texts(then.content)[0] == workspace.recipe("cat").digest()
    assert then.headers["X-Overpaint-Revision"] == "1"
    half = [{"patch": "cat", "strength": 0.5}]
    free = client.post("/v1/generate", patches=half, prompt=PROMPT, seed=0, steps=1)
    assert texts(free.content)[0] == workspace.recipe("half").digest()
    assert "X-Overpaint-Recipe" not in free.headers
    nothing = client.post("/v1/generate", patches=[], prompt=PROMPT, seed=0, steps=1)
    assert texts(nothing.content)[0] == workspace.base("tiny").fingerprint


def test_two_hundred_requests_of_eight_clients_never_get_a_picture_of_another_recipe(
    serve: Serve, workspace: Workspace
) -> None:
    seeds, pipe = (0, 1), workspace.base("tiny").pipeline()
    expected = {name: drawn_alone(workspace, name, *seeds, pipe=pipe) for name in RECIPES}
    digests = {name: workspace.recipe(name).digest() for name in RECIPES}
    first = serve("generate")
    swaps: list[float] = []
    first.server.metrics.swapped = swaps.append  # type: ignore[method-assign, assignment]
    rng = random.Random(0)
    asked = [(rng.choice(list(RECIPES)), rng.choice(seeds)) for _ in range(200)]

    async def all_clients() -> list[Any]:
        transport = httpx.ASGITransport(app=first.http.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=first.headers) as http:

            async def one(requests: list[tuple[str, int]]) -> list[Any]:
                body = {"prompt": PROMPT, "steps": 1}
                return [
                    (
                        name,
                        seed,
                        await http.post("/v1/generate", json={**body, "recipe": name, "seed": seed}, timeout=300),
                    )
                    for name, seed in requests
                ]

            return [each for found in await asyncio.gather(*(one(asked[i::8]) for i in range(8))) for each in found]

    answers = asyncio.run(all_clients())
    assert len(answers) == 200
    for name, seed, answer in answers:
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Overpaint-Weights"] == texts(answer.content)[0] == digests[name]
        assert np.array_equal(pixels(answer.content), expected[name][seed]), f"{name} with seed {seed}"
    changes = sum(a[0] != b[0] for a, b in pairwise(asked))
    assert len(swaps) < changes, "requests for one recipe are drawn together"


class Held:
    """Holds the first picture while it is being drawn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.go = threading.Event(), threading.Event()

        def draw(*args: Any) -> Any:
            self.began.set()
            assert self.go.wait(60)
            return generate(*args)

        monkeypatch.setattr(drawing, "generate", draw)


def test_a_takedown_reaches_pictures_that_wait_and_not_the_one_that_is_being_drawn(
    serve: Serve, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, held = serve(), Held(monkeypatch)
    with ThreadPoolExecutor(3) as pool:
        under_way = pool.submit(client.picture, "cat")
        assert held.began.wait(60)
        waiting = [pool.submit(client.picture, "cat", seed) for seed in (1, 2)]
        while len(client.server.queue) < 2:
            pass
        taken_down = client.post("/v1/add/cat", patches=["dog"], why="court order")
        assert taken_down.status_code == 200
        held.go.set()
        before, after = under_way.result(60), [each.result(60) for each in waiting]
    assert texts(before.content)[0] == workspace.recipe("cat@1").digest()
    assert before.headers["X-Overpaint-Revision"] == "1"
    for answer in after:
        assert texts(answer.content)[0] == taken_down.json()["weights"] == workspace.recipe("both").digest()
        assert answer.headers["X-Overpaint-Revision"] == "2"


def test_a_change_by_another_process_reaches_the_next_picture(serve: Serve, workspace: Workspace) -> None:
    client = serve("generate")
    client.picture("cat")
    workspace.recipe("cat").remove("cat")
    assert texts(client.picture("cat").content)[0] == workspace.base("tiny").fingerprint


def test_a_base_that_was_replaced_under_its_name_draws_nothing(tmp_path: Path, base_folder: Path) -> None:
    other = overpaint.open(tmp_path / "registry")
    first = other.add_base("mine", base_folder).fingerprint
    app = create_app(ServeOptions(str(tmp_path / "registry"), device="cpu", tokens=False))
    plain: dict[str, Any] = {"patches": [], "prompt": PROMPT, "steps": 1}
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as http:
        client = Client(http, {})
        assert texts(client.post("/v1/generate", **plain).content)[0] == first
        other.remove_base("mine")
        other.add_base("mine", tiny_base(tmp_path / "second", seed=1).path)
        other.create_recipe("new", base="mine")
        for refused in (
            client.post("/v1/generate", **plain),
            client.picture("new"),
            client.post("/v1/recipes", recipe="another"),
            client.get("/v1/patches"),
            client.get("/health"),
        ):
            assert refused.status_code == 503
            assert "the base that this server loaded as 'mine'" in refused.json()["error"]["message"]
        other.add_base("first", base_folder)
        assert texts(client.post("/v1/generate", **plain).content)[0] == first
        assert client.picture("new").status_code == 409
        assert client.get("/health").json()["base"] == "first"


def test_several_pictures_have_seeds_that_follow_each_other(serve: Serve, workspace: Workspace) -> None:
    client = serve("generate")
    answer = client.post("/v1/images/generations", model="cat", prompt=PROMPT, n=2, seed=5, steps=1).json()
    assert [each["seed"] for each in answer["data"]] == [5, 6]
    assert answer["size"] == "16x16"
    files = [base64.b64decode(each["b64_json"]) for each in answer["data"]]
    for file, expected in zip(files, drawn_alone(workspace, "cat", 5, 6), strict=True):
        assert np.array_equal(pixels(file), expected)


def test_a_picture_may_be_of_another_size_that_the_base_can_draw(serve: Serve) -> None:
    client = serve("generate")
    assert pixels(client.picture("cat", size="24x16").content).shape == (16, 24, 3)
    assert pixels(client.picture("cat", size="auto").content).shape == (16, 16, 3)
    for size in ("1024x1024", "8000x16", "17x16", "0x16"):
        refused = client.picture("cat", size=size)
        assert refused.status_code in (400, 422)
        assert "16 x 16 pixels" in refused.text or "pattern" in refused.text


def test_a_client_that_goes_away_leaves_no_picture_to_be_drawn(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client, held = serve("generate"), Held(monkeypatch)
    drawn: list[str | None] = []
    client.server.metrics.drew = lambda recipe, seconds: drawn.append(recipe)  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.picture, "cat")
        assert held.began.wait(60)
        _leave(client)
        held.go.set()
        assert first.result(60).status_code == 200
        assert client.picture("fox").status_code == 200
    assert drawn == ["cat", "fox"]


def _leave(client: Client) -> None:
    """Ask for a picture of `dog`, and go before it is drawn."""
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": b'{"recipe": "dog", "prompt": "a", "steps": 1}', "more_body": False},
        {"type": "http.disconnect"},
    ]
    headers = [(b"content-type", b"application/json"), (b"authorization", client.headers["Authorization"].encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/generate", "raw_path": b"/v1/generate", "query_string": b""}

    async def receive() -> dict[str, Any]:
        disconnect: dict[str, Any] = {"type": "http.disconnect"}
        return messages.pop(0) if messages else disconnect

    async def send(message: Any) -> None:
        pass

    async def ask() -> None:
        app: Any = client.http.app
        await app({**scope, "headers": headers, "http_version": "1.1", "scheme": "http"}, receive, send)

    asyncio.run(ask())
