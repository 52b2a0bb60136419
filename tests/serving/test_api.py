"""What the server answers: recipes and their history, roles, limits, and one clear sentence for everything else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from overpaint.registry import history, models
from overpaint.serving import check, drawing
from overpaint.serving.access import RateLimiter, TooMany
from overpaint.workspace.workspace import Workspace
from tests.serving.conftest import Client, Serve, as_role, texts

pytestmark = pytest.mark.slow


def add_expired(workspace: Workspace, recipe: str, patch: str) -> None:
    """Add a patch that expires today, which is the first day on which it does not hold."""
    workspace.recipe(recipe).add(patch, until=history.today())


@pytest.fixture
def client(serve: Serve) -> Client:
    """A caller who may do everything."""
    return serve()


def message(answer: Any) -> str:
    """The sentence of a refusal."""
    assert set(answer.json()) == {"error"}, answer.text
    text: str = answer.json()["error"]["message"]
    return text


def test_changes_are_recorded_with_the_owner_of_the_token(client: Client, workspace: Workspace) -> None:
    added = client.post("/v1/add/plain", patches=["cat", "dog"], why="court order", expires="2999-01-31").json()
    assert added["revision"] == 1
    assert [each["who"] for each in added["changes"]] == ["Ada", "Ada"]
    assert added["weights"] == workspace.recipe("plain").digest() == workspace.recipe("both").digest()
    again = client.post("/v1/add/plain", patches=["cat", "dog"])
    assert (again.status_code, again.json()["changes"]) == (200, []), "a call that is repeated changes nothing"
    shown = client.get("/v1/recipes/plain").json()
    assert {each["concept"]: each["expires"] for each in shown["patches"]} == dict.fromkeys(
        ("cat", "dog"), "2999-01-31"
    )
    other = as_role(client, "change", "Bob")
    assert other.post("/v1/remove/plain", patches=["cat"], why="licensed").json()["changes"][0]["strength"] is None
    assert other.post("/v1/undo/plain").json()["weights"] == added["weights"]
    lines = client.get("/v1/history/plain").json()
    assert [(each["action"], each["who"], each["why"]) for each in lines[:3]] == [
        ("add", "Ada", "court order"),
        ("add", "Ada", "court order"),
        ("remove", "Bob", "licensed"),
    ]
    assert [each.who for each in workspace.recipe("plain").log()] == [each["who"] for each in lines]


def test_a_takedown_reaches_every_recipe_in_one_call(client: Client, workspace: Workspace) -> None:
    answer = client.post("/v1/takedown", patches=["fox"], why="noon").json()
    assert answer["failed"] == {}
    assert len(answer["changed"]) == len(workspace.recipes())
    assert all(
        any(patch.concept == "fox" for patch, _ in workspace.recipe(record.name).patches())
        for record in workspace.recipes()
    )
    again = client.post("/v1/takedown", patches=["fox"]).json()
    assert not any(each["changes"] for each in again["changed"])
    assert client.post("/v1/takedown", patches=["fxo"]).status_code == 404


def test_lists_say_what_the_registry_holds(client: Client, workspace: Workspace) -> None:
    assert [each["recipe"] for each in client.get("/v1/recipes").json()] == [each.name for each in workspace.recipes()]
    assert [each["id"] for each in client.get("/v1/models").json()["data"]] == [
        each.name for each in workspace.recipes()
    ]
    assert client.get("/v1/models/cat").json()["object"] == "model"
    assert {each["concept"] for each in client.get("/v1/patches").json()} == {"cat", "dog", "fox", "car"}
    (patch,) = client.get("/v1/patches", concept="cat").json()
    assert client.get(f"/v1/patches/{patch['patch'][:8]}").json() == client.get("/v1/patches/cat").json() == patch
    made = client.post("/v1/recipes", recipe="a/b ü@x")
    assert made.status_code == 201
    assert client.post("/v1/add/a%2Fb%20%C3%BC@x", patches=["cat"]).json()["recipe"] == "a/b ü@x"
    picture = client.picture("a/b ü@x")
    assert picture.headers["X-Overpaint-Recipe"] == "a/b%20%C3%BC%40x"
    assert client.get("/v1/recipes/both@1").json()["revision"] == 1
    assert client.get("/health").json()["status"] == "ok"


REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("/v1/generate", {"recipe": "bohth", "prompt": "a"}, 404, "did you mean 'both'"),
    ("/v1/generate", {"recipe": "both@9", "prompt": "a"}, 404, "9"),
    ("/v1/images/generations", {"model": "bohth", "prompt": "a"}, 404, "did you mean 'both'"),
    ("/v1/generate", {"patches": [{"patch": "caht"}], "prompt": "a"}, 404, "did you mean 'cat'"),
    ("/v1/generate", {"patches": [{"patch": "cat"}, {"patch": "cat"}], "prompt": "a"}, 400, "named twice"),
    ("/v1/generate", {"prompt": "a"}, 422, "one of the two"),
    ("/v1/generate", {"recipe": "cat", "patches": [], "prompt": "a"}, 422, "one of the two"),
    ("/v1/generate", {"recipe": "cat", "prompt": "a", "step": 3}, 422, "step"),
    ("/v1/generate", {"recipe": "cat", "prompt": "a" * 3000}, 422, "2000 characters"),
    ("/v1/generate", {"recipe": "cat", "prompt": "a\0"}, 422, "does not print"),
    ("/v1/generate", {"recipe": "cat", "prompt": "a", "steps": 101}, 400, "at most 100 steps"),
    ("/v1/generate", {"recipe": "cat", "prompt": "a", "steps": "many"}, 422, "integer"),
    ("/v1/generate", {"recipe": "cat", "prompt": "a", "steps": 2.5}, 422, "integer"),
    ("/v1/generate", {"recipe": "cat", "prompt": "a", "steps": "2"}, 422, "integer"),
    ("/v1/generate", {"recipe": "cat", "prompt": "a", "seed": 2**63}, 422, "seed"),
    ("/v1/generate", {"recipe": "cat", "prompt": "a", "seed": 2**64}, 422, "seed"),
    ("/v1/generate", {"recipe": "cat", "prompt": "a", "guidance": "7"}, 422, "guidance"),
    ("/v1/generate", {"patches": [{"patch": "cat", "strength": "1"}], "prompt": "a"}, 422, "strength"),
    ("/v1/images/generations", {"model": "cat", "prompt": "a", "response_format": "url"}, 422, "b64_json"),
    ("/v1/images/generations", {"model": "cat", "prompt": "a", "n": 1000}, 422, "n: "),
    ("/v1/add/cat", {"patches": ["dgo"]}, 404, "did you mean 'dog'"),
    ("/v1/add/kat", {"patches": ["dog"]}, 404, "did you mean 'cat'"),
    ("/v1/add/cat", {"patches": ["dog"], "strength": "1"}, 422, "strength"),
    ("/v1/add/cat", {"patches": ["dog"], "expires": "soon"}, 422, "expires"),
    ("/v1/add/cat", {"patches": ["dog"], "expires": 32472230400}, 422, "a day is written YYYY-MM-DD; got 32472230400"),
    ("/v1/add/cat", {"patches": ["dog"], "expires": "32472230400"}, 422, "a day is written YYYY-MM-DD"),
    ("/v1/add/cat", {"patches": ["dog"], "expires": "2999-01-31T00:00:00"}, 422, "a day is written YYYY-MM-DD"),
    (
        "/v1/add/cat",
        {"patches": ["dog"], "expires": "2020-01-01"},
        400,
        "a patch cannot expire on 2020-01-01, which is past",
    ),
    ("/v1/remove/cat", {"patches": ["dog"]}, 404, "dog"),
    ("/v1/undo/plain", {}, 404, "never changed"),
    ("/v1/recipes", {"recipe": "cat"}, 409, "is there already"),
    ("/v1/recipes", {"recipe": "cat@7"}, 400, "revision"),
    ("/v2/generate", {}, 404, "/docs"),
]
"""Route, body, the answer's code, and what its sentence says."""


def test_bad_input_gets_one_sentence_and_changes_nothing(client: Client, workspace: Workspace) -> None:
    before = [(each.name, each.revision) for each in workspace.recipes()]
    for path, body, status, sentence in REFUSED:
        answer = client.post(path, **body)
        assert answer.status_code == status, (path, body, answer.text)
        assert sentence in message(answer)
    assert [(each.name, each.revision) for each in workspace.recipes()] == before


BROKEN = [
    (b'{"recipe":', 422),
    (b'{"recipe": "\\ud800", "prompt": "a"}', 422),
    (b'{"recipe": "cat", "prompt": "\\ud800"}', 422),
    (b'{"recipe": "cat", "prompt": "a", "guidance": NaN}', 422),
    (b'{"recipe": "cat", "prompt": "a", "guidance": 1e999}', 422),
    (b'{"patches": [{"patch": "cat", "strength": NaN}], "prompt": "a"}', 422),
    (b'{"recipe": "cat", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400),
    (b"[" * 50_000, 400),
    (b"\xff\xfe", 422),
    (b"", 422),
    (b'{"recipe": "cat", "prompt": "' + b"a" * 70_000 + b'"}', 413),
]
"""Bodies that are no requests, and the answer's code."""


def test_bodies_that_are_no_requests_are_refused(client: Client) -> None:
    headers = {**client.headers, "Content-Type": "application/json"}
    for content, status in BROKEN:
        answer = client.http.post("/v1/generate", content=content, headers=headers)
        assert answer.status_code == status, (content[:40], answer.text)
        assert message(answer)


def test_a_body_that_does_not_say_how_long_it_is_has_the_same_limit(client: Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"a" * 1024

    headers = {**client.headers, "Content-Type": "application/json"}
    assert client.http.post("/v1/generate", content=endless(), headers=headers).status_code == 413


def test_a_token_does_what_its_role_allows_and_no_more(client: Client) -> None:
    nobody = Client(client.http, {})
    assert nobody.get("/health").status_code == 200
    assert nobody.get("/v1/recipes").status_code == 401
    assert Client(client.http, {"Authorization": "Bearer x"}).get("/v1/recipes").headers["WWW-Authenticate"] == "Bearer"
    reader = as_role(client, "read")
    assert reader.get("/v1/recipes").status_code == 200
    assert "needs a token with the role 'generate'" in message(reader.picture("cat"))
    generator = as_role(client, "generate")
    assert generator.picture("cat").status_code == 200
    refused = generator.post("/v1/add/cat", patches=["dog"])
    assert refused.status_code == 403
    assert "and that of 'Bob' has 'generate'" in message(refused)
    client.server.tokens.revoke("Bob")
    assert generator.picture("cat").status_code == 401


def test_a_token_for_some_recipes_draws_with_these_as_they_are_now(client: Client) -> None:
    bound = as_role(client, "generate", recipes=("cat",))
    assert bound.picture("cat").status_code == 200
    for refused in (
        bound.picture("dog"),
        bound.picture("cat@0"),
        bound.post("/v1/generate", patches=[], prompt="a", steps=1),
        bound.post("/v1/images/generations", model="cat@1", prompt="a", steps=1),
    ):
        assert refused.status_code == 403
        assert "'cat' as they are now, and for nothing else" in message(refused)


def test_a_token_for_some_recipes_changes_these_and_no_others(client: Client, workspace: Workspace) -> None:
    for name in ("cat", "dog"):
        add_expired(workspace, name, "fox")
    bound = as_role(client, "change", recipes=("cat", "mine"))
    before = {each.name: each.revision for each in workspace.recipes()}
    for refused in (
        bound.post("/v1/add/dog", patches=["cat"]),
        bound.post("/v1/remove/dog", patches=["dog"]),
        bound.post("/v1/undo/dog"),
        bound.post("/v1/recipes", recipe="another"),
        bound.post("/v1/expired/remove?recipe=dog"),
        bound.post("/v1/add/cat@1", patches=["dog"]),
        bound.picture("dog"),
    ):
        assert refused.status_code == 403
        assert "the token of 'Bob' is for 'cat', 'mine'" in message(refused)
    assert {each.name: each.revision for each in workspace.recipes()} == before
    assert {each["recipe"] for each in bound.post("/v1/expired/remove").json()} == {"cat"}
    assert bound.post("/v1/recipes", recipe="mine").status_code == 201
    changed = bound.post("/v1/takedown", patches=["car"]).json()
    assert ({each["recipe"] for each in changed["changed"]}, changed["failed"]) == ({"cat", "mine"}, {})
    assert bound.post("/v1/remove/cat", patches=["car"]).status_code == 200
    assert {each.name for each in workspace.recipes() if each.revision != before.get(each.name)} == {"cat", "mine"}


def test_a_damaged_file_of_tokens_is_named_in_the_servers_log_alone(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    path = client.server.tokens.path
    path.write_text(path.read_text().replace('"recipes": []', '"recipes": ""'))
    refused = client.get("/v1/recipes")
    assert refused.status_code == 503
    assert message(refused).startswith("the server's list of tokens cannot be used, so nobody is let in")
    assert str(path) in caplog.text
    assert str(path) not in refused.text


def test_a_caller_who_asks_too_often_is_told_when_to_come_again(serve: Serve) -> None:
    client = serve(rate=3)
    assert [client.picture("cat", seed).status_code for seed in range(3)] == [200] * 3
    refused = client.picture("cat")
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert "at most 3 pictures in a minute" in message(refused)
    assert as_role(client, "generate").picture("cat").status_code == 200, "others have allowances of their own"


def test_a_request_that_no_waiting_would_help_is_refused_as_such(serve: Serve) -> None:
    for options, sentence in (
        ({"queue": 1}, "2 pictures in one request, and at most 1 may wait"),
        ({"rate": 1}, "2 pictures in one request, and at most 1 in a minute"),
    ):
        client = serve(**options)
        for _ in range(3):
            refused = client.post("/v1/images/generations", model="cat", prompt="a", n=2, steps=1)
            assert refused.status_code == 400
            assert sentence in message(refused)
        assert client.picture("cat").status_code == 200, "refusals spend nothing"


def test_allowance_comes_back_with_time_and_is_shared_through_a_file(tmp_path: Any) -> None:
    first, second = RateLimiter(60, tmp_path / "rates.db"), RateLimiter(60, tmp_path / "rates.db")
    first.spend("Ada", 40, now=0.0)
    second.spend("Ada", 20, now=0.0)
    with pytest.raises(TooMany) as refused:
        first.spend("Ada", 10, now=0.0)
    assert refused.value.seconds == pytest.approx(10.0)
    first.spend("Bob", 60, now=0.0)
    first.spend("Ada", 10, now=10.0)
    with pytest.raises(TooMany):
        second.spend("Ada", 1, now=10.5)
    RateLimiter(0, None).spend("Ada", 10**6)


def test_a_full_queue_answers_429_with_a_time(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client, go, original = serve(queue=1, rate=4), threading.Event(), drawing.generate  # type: ignore[attr-defined]
    began = threading.Event()

    def held(*args: Any) -> Any:
        began.set()
        assert go.wait(60)
        return original(*args)

    monkeypatch.setattr(drawing, "generate", held)
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(client.picture, "cat")]
        assert began.wait(60)
        answers.append(pool.submit(client.picture, "dog"))
        while not len(client.server.queue):
            pass
        refused = client.picture("fox")
        spent = client.server.limiter
        with pytest.raises(TooMany):
            spent.spend(client.server.tokens.tokens()[0].sha256, 3)
        spent.spend(client.server.tokens.tokens()[0].sha256, 2)  # all but the two pictures that were let wait
        go.set()
        assert [each.result(60).status_code for each in answers] == [200, 200]
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    assert "wait already" in message(refused)
    assert 'overpaint_refusals_total{kind="queue_full"} 1.0' in client.get("/metrics").text


def test_a_recipe_with_a_lost_patch_answers_503_and_the_others_go_on(serve: Serve, workspace: Workspace) -> None:
    record = workspace.registry.patch("dog")
    for blob in {record.id, record.blob}:
        for file in (workspace.registry.folder / "blobs").rglob(f"*{blob[2:]}"):
            file.unlink()
    client = serve()
    lost = client.picture("both")
    assert lost.status_code == 503
    assert f"patch {record.id[:12]} for 'dog'" in message(lost)
    assert client.picture("cat").status_code == 200
    assert client.post("/v1/remove/both", patches=["dog"]).status_code == 200
    assert texts(client.picture("both").content)[0] == workspace.recipe("cat").digest()


def test_a_registry_that_is_upgraded_meanwhile_is_neither_read_nor_changed(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.picture("cat").status_code == 200
    monkeypatch.setattr(models, "HEAD", "0000")
    for answer in (client.picture("cat"), client.get("/v1/recipes"), client.post("/v1/add/cat", patches=["dog"])):
        assert answer.status_code == 503
        assert "was brought to schema" in message(answer)
    monkeypatch.undo()
    assert client.get("/v1/recipes/cat").json()["revision"] == 1


def test_a_recipe_of_another_base_is_refused_and_not_listed(serve: Serve, workspace: Workspace, tmp_path: Any) -> None:
    from overpaint.testing import tiny_base

    workspace.add_base("other", tiny_base(tmp_path / "other", seed=1).path)
    workspace.create_recipe("elsewhere", base="other")
    client = serve(base="tiny")
    refused = client.picture("elsewhere")
    assert refused.status_code == 409
    assert "is for the base 'other', and this server draws with 'tiny'" in message(refused)
    assert "elsewhere" not in client.get("/v1/models").text
    assert not client.get("/v1/recipes/elsewhere").json()["served"]


def test_expired_patches_stay_unless_the_server_is_told_to_enforce_expiry(serve: Serve, workspace: Workspace) -> None:
    for name in ("plain", "dog"):
        add_expired(workspace, name, "cat")
    patient = serve()
    assert texts(patient.picture("plain").content)[0] == workspace.recipe("cat").digest()
    assert {each["recipe"] for each in patient.get("/v1/expired").json()} == {"plain", "dog"}
    assert [each["who"] for each in patient.post("/v1/expired/remove?recipe=dog").json()] == ["Ada"]
    strict = serve(enforce_expiry=True)
    picture = strict.picture("plain")
    assert texts(picture.content)[0] == workspace.base("tiny").fingerprint
    assert picture.headers["X-Overpaint-Revision"] == "2"
    assert strict.get("/v1/expired").json() == []
    assert strict.get("/v1/history/plain").json()[-1]["who"] == "overpaint serve"


def test_metrics_count_pictures_and_swaps(client: Client) -> None:
    for name in ("cat", "cat", "dog"):
        client.picture(name)
    page = client.get("/metrics").text
    assert 'overpaint_pictures_total{recipe="cat"} 2.0' in page
    assert "overpaint_swap_seconds_count 2.0" in page
    assert "overpaint_waiting 0.0" in page


def test_a_server_without_tokens_is_for_this_machine_alone(serve: Serve, workspace: Workspace) -> None:
    client = serve(tokens=False)
    assert Client(client.http, {}).post("/v1/add/cat", patches=["dog"]).status_code == 200
    assert workspace.recipe("cat").log()[-1].who not in ("", "Ada")
    foreign = client.http.get("/v1/recipes", headers={"Host": "evil.example"})
    assert foreign.status_code == 400
    assert "not as 'evil.example'" in message(foreign)
    with pytest.raises(Exception, match="whoever reaches 0"):
        check(client.server.options, "0.0.0.0")


def test_without_tokens_a_page_of_another_site_changes_nothing(serve: Serve, workspace: Workspace) -> None:
    client = serve(tokens=False)
    add_expired(workspace, "cat", "dog")
    before = workspace.recipe("cat").record.revision
    for origin in ("http://evil.example", "null", "http://127.0.0.1:3000", "http://127.0.0.1.evil.example"):
        for path in ("/v1/expired/remove", "/v1/undo/cat"):
            refused = client.http.post(path, headers={"Origin": origin})
            assert refused.status_code == 403, (origin, path)
            assert f"a page of {origin!r}" in message(refused)
    assert workspace.recipe("cat").record.revision == before
    assert client.http.post("/v1/expired/remove", headers={"Origin": "http://127.0.0.1"}).status_code == 200
