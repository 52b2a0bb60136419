"""A server of the embedded base: what swapping recipes costs beside drawing, and a thousand malformed requests.

Two hundred pictures by eight clients over ten recipes, each picture's digest held against its recipe's. Seconds are of the one
thread that draws; under load they grow alike, so read the ratio. Malformed requests are made by schemathesis from the server's
own OpenAPI schema; none may be answered with a server's error.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import schemathesis
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

import overpaint
from benchmarks.tables import arguments, save, show
from overpaint.serving.access import ServeOptions, TokenFile
from overpaint.serving.app import create_app
from overpaint.workspace.workspace import Workspace

CONCEPTS = ("cat", "dog", "fox", "tiger", "lion", "wolf")


def malformed(http: TestClient, headers: dict[str, str], count: int) -> Iterator[tuple[str, Any]]:
    """At least `count` requests, about half of them malformed, and their answers: (method and path, answer)."""
    app: Any = http.app
    found: Any = schemathesis.openapi.from_dict(app.openapi()).get_all_operations()
    operations = [each.ok() for each in found]
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            yield from _asked(http, headers, operation.as_strategy(generation_mode=mode), -(-count // len(operations)))


def _asked(http: TestClient, headers: dict[str, str], cases: Any, count: int) -> list[tuple[str, Any]]:
    """The answers to `count` requests of one kind, the same ones each time."""
    answers: list[tuple[str, Any]] = []

    # Nothing is shrunk and nothing kept: a failure is the caller's to see.
    @seed(0)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def ask(case: Any) -> None:
        how = dict(case.as_transport_kwargs(base_url="http://testserver"))
        how["headers"] = {**dict(how.get("headers") or {}), **headers}
        how["content"] = how.pop("data", None)
        known = ("method", "url", "params", "headers", "content", "json")
        answer = http.request(**{name: how[name] for name in known if how.get(name) is not None})
        answers.append((f"{case.method} {case.formatted_path}", answer))

    with suppress(Unsatisfiable):  # a route without parameters has no malformed request
        ask()
    return answers


def registry(folder: Path) -> Workspace:
    """A registry with the embedded base and ten recipes on it."""
    workspace = overpaint.open(folder)
    workspace.add_base("emoji", "emoji")
    for concept in CONCEPTS:
        workspace.solve(concept)
    rng = random.Random(0)
    for number in range(10):
        recipe = workspace.create_recipe(f"recipe {number}")
        recipe.add_all(rng.sample(CONCEPTS, rng.randint(1, 4)), rng.choice((0.5, 1.0)))
    return workspace


class Stopwatch:
    """What `drawing.Meter` asks for, adding up."""

    def __init__(self) -> None:
        self.swaps: list[float] = []
        self.pictures: list[float] = []

    def swapped(self, seconds: float) -> None:
        self.swaps.append(seconds)

    def drew(self, recipe: str | None, seconds: float) -> None:
        self.pictures.append(seconds)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="of each picture")
    parser.add_argument("--requests", type=int, default=1000, help="malformed ones")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        workspace = registry(Path(scratch) / "registry")
        folder = workspace.registry.folder
        headers = {"Authorization": f"Bearer {TokenFile(folder).add('benchmark', 'change')}"}
        options = ServeOptions(str(folder), device="cpu", rate=0, max_steps=asked.steps)
        with TestClient(create_app(options), raise_server_exceptions=False) as http:
            tables = [_pictures(http, headers, workspace, asked), _malformed(http, headers, asked.requests)]
    save(asked.json, *tables)


def _pictures(http: TestClient, headers: dict[str, str], workspace: Workspace, asked: Any) -> dict[str, Any]:
    digests = {record.name: workspace.recipe(record.name).digest() for record in workspace.recipes()}
    watch, app = Stopwatch(), cast(Any, http.app)
    app.state.server.painter._meter = watch
    rng = random.Random(1)
    wanted = [rng.choice(list(digests)) for _ in range(asked.pictures)]

    def draw(name: str) -> bool:
        body = {"recipe": name, "prompt": "a photo of a cat", "steps": asked.steps}
        answer = http.post("/v1/generate", json=body, headers=headers)
        return answer.status_code == 200 and bool(answer.headers["X-Overpaint-Weights"] == digests[name])

    with ThreadPoolExecutor(asked.clients) as pool:
        right = sum(pool.map(draw, wanted))
    drawing, swapping = sum(watch.pictures), sum(watch.swaps)
    rows = [
        ["pictures", asked.pictures],
        ["under their recipe", right],
        ["seconds of a picture", drawing / len(watch.pictures)],
        ["swaps", len(watch.swaps)],
        ["ms of a swap", 1000 * swapping / max(1, len(watch.swaps))],
        ["swapping, % of drawing", 100 * swapping / drawing],
    ]
    return show(f"{asked.clients} clients, {len(digests)} recipes, {asked.steps} steps", ["what", "value"], rows)


def _malformed(http: TestClient, headers: dict[str, str], count: int) -> dict[str, Any]:
    codes = Counter(answer.status_code for _, answer in malformed(http, headers, count))
    return show("Malformed requests", ["answer", "requests"], [[code, codes[code]] for code in sorted(codes)])


if __name__ == "__main__":
    main()
