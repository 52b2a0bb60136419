"""The HTTP interface: routes, who may use them, what every refusal looks like, and what Prometheus reads.

No path and no URL of a caller is ever opened: names are looked up in the registry, and everything else is a number or a prompt.
"""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import torch
from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException

from overpaint.bases.checkpoint import BrokenBase
from overpaint.core import __version__
from overpaint.core.asgi import OwnPages
from overpaint.core.encoding import canonical_json
from overpaint.core.errors import AlreadyExists, NotFound, OverpaintError
from overpaint.core.names import SEEDS, printed, sought_name
from overpaint.patches.live import BadPipeline, ForeignChange
from overpaint.patches.patch import WrongBase
from overpaint.registry.database import RegistryVersionError
from overpaint.registry.history import StaleRevision
from overpaint.registry.records import HistoryRecord, PatchRecord, RecipeRecord
from overpaint.serving import schemas
from overpaint.serving.access import (
    METRICS_FOLDER,
    BadTokens,
    BodyLimit,
    RateLimiter,
    Role,
    ServeOptions,
    Token,
    TokenFile,
    TooMany,
    TryLater,
)
from overpaint.serving.drawing import (
    BaseReplaced,
    Drawn,
    OtherBase,
    Painter,
    PictureQueue,
    PictureRequest,
    QueueFull,
    Stopping,
)
from overpaint.workspace.opened import LostPatch
from overpaint.workspace.recipe import Recipe, current_user
from overpaint.workspace.workspace import Workspace

if TYPE_CHECKING:
    from overpaint.bases.base import Base


log = logging.getLogger("overpaint.serving")

EXPIRY_SECONDS = 60.0
"""How often a server that enforces expiry looks at recipes that nobody draws with."""


class Forbidden(OverpaintError):
    """A token that does not allow what is asked for."""


class Unauthorized(OverpaintError):
    """No token, or one that is not known."""


STATUS: tuple[tuple[type[OverpaintError], int, str], ...] = (
    (Unauthorized, 401, "unauthorized"),
    (Forbidden, 403, "forbidden"),
    (NotFound, 404, "not_found"),
    (AlreadyExists, 409, "already_exists"),
    (OtherBase, 409, "other_base"),
    (WrongBase, 409, "other_base"),
    (StaleRevision, 409, "changed_meanwhile"),
    (TooMany, 429, "too_many_requests"),
    (QueueFull, 429, "queue_full"),
    (LostPatch, 503, "lost_patch"),
    (RegistryVersionError, 503, "registry_upgraded"),
    (Stopping, 503, "stopping"),
    (BadTokens, 503, "tokens_unreadable"),
    (BaseReplaced, 503, "base_replaced"),
    (BrokenBase, 503, "broken_base"),
    (BadPipeline, 503, "broken_base"),
    (ForeignChange, 503, "broken_base"),
)
"""Status and type of each kind of refusal. Any other is a caller's mistake (400), or a failure of disk or database (503)."""
_REFUSALS = {
    400: "what is asked for cannot be done",
    401: "no token, or an unknown one",
    403: "the token has not the role, or is for other recipes",
    404: "an unknown name, with the nearest in the message",
    409: "in conflict with what is there",
    413: "the body is too large",
    422: "the request is not as described here",
    429: "too many requests, or too many pictures wait; Retry-After says when to come again",
    503: "a patch's bytes are lost, the registry was upgraded, its disk fails, or the base or the tokens are not as needed",
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    code: {"model": schemas.ErrorAnswer, "description": text} for code, text in _REFUSALS.items()
}


class Server:
    """What the routes of one process share."""

    def __init__(self, options: ServeOptions, on_base: Callable[[Base], None] | None = None) -> None:
        self.options = options
        self.workspace = Workspace.open(options.registry, create=False)
        if on_base is not None:
            self.workspace.on_base = on_base
        self.tokens = TokenFile(self.workspace.registry.folder)
        shared = options.shared
        self.limiter = RateLimiter(options.rate, None if shared is None else shared / "rates.sqlite3")
        self.metrics = Metrics()
        self.painter = Painter(
            self.workspace,
            self.workspace.base_name(options.base),
            device=options.device,
            dtype=options.dtype,
            enforce_expiry=options.enforce_expiry,
            meter=self.metrics,
        )
        self.queue = PictureQueue(self.painter.draw, options.queue)

    def caller(self, role: Role, presented: str | None) -> Token:
        """Whose token this is. Raises Unauthorized, Forbidden, RegistryVersionError."""
        self.workspace.registry.refuse_if_upgraded()
        if not self.options.tokens:
            return Token(current_user(), "change", (), "", "")
        token = None if presented is None else self.tokens.find(presented)
        if token is None:
            raise Unauthorized(
                "a token of this server is needed, as `Authorization: Bearer TOKEN`; see `overpaint token new`"
            )
        if not token.allows(role):
            raise Forbidden(
                f"this needs a token with the role {role!r}, and that of {token.owner!r} has {token.role!r}"
            )
        return token

    def enqueue(self, caller: Token, wanted: Sequence[PictureRequest]) -> list[Future[Drawn]]:
        """Check what is asked for and let it wait. Raises as `Painter.select` and `PictureQueue.put`; Forbidden, TooMany."""
        first = wanted[0]
        if not caller.may_use(first.recipe):
            raise Forbidden(f"{_confined(caller)} as they are now, and for nothing else")
        if first.steps > self.options.max_steps:
            raise OverpaintError(f"at most {self.options.max_steps} steps are drawn here; got {first.steps}")
        self.painter.check_size(first.size)
        selected = self.painter.select(first)
        # In the queue's lock: a request that finds no room spends nothing of its caller's allowance.
        return self.queue.put(
            [(each, selected) for each in wanted], lambda: self.limiter.spend(caller.sha256, len(wanted))
        )

    def changeable(self, caller: Token, recipe: str) -> str:
        """The name of a recipe that a caller may change. Raises Forbidden."""
        name = sought_name(recipe, "recipe")
        if not caller.may_use(name):
            raise Forbidden(f"{_confined(caller)}, and changes no other")
        return name

    async def expire(self) -> None:
        """Remove what has expired, now and again, also where nobody draws."""
        while True:
            try:
                await run_in_threadpool(self.painter.remove_expired)
            except OverpaintError as error:
                log.error("expired patches stay: %s", error)
            await asyncio.sleep(EXPIRY_SECONDS)


def _confined(caller: Token) -> str:
    return f"the token of {caller.owner!r} is for {', '.join(map(repr, caller.recipes))}"


def create_app(options: ServeOptions, on_base: Callable[[Base], None] | None = None) -> FastAPI:
    """The server as an ASGI application; the base is loaded when it starts. `on_base` is as `Workspace.on_base`.

    Raises OverpaintError when it starts, for a registry or base that cannot be opened.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server = app.state.server = await run_in_threadpool(Server, options, on_base)
        server.queue.start()
        expiring = asyncio.create_task(server.expire()) if options.enforce_expiry else None
        try:
            yield
        finally:
            if expiring is not None:
                expiring.cancel()
                with suppress(asyncio.CancelledError):
                    await expiring
            await run_in_threadpool(server.queue.stop)
            server.limiter.close()

    app = FastAPI(
        title="Overpaint",
        version=__version__,
        summary="Pictures of one base under any recipe of a registry",
        lifespan=lifespan,
        responses=REFUSALS,
    )
    app.include_router(router)
    app.add_middleware(BodyLimit, limit=options.max_body)
    if not options.tokens:
        app.add_middleware(OwnPages)
    app.add_exception_handler(OverpaintError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _plain)
    for kind in (MemoryError, torch.OutOfMemoryError):
        app.add_exception_handler(kind, _no_memory)
    app.add_exception_handler(Exception, _bug)
    return app


# Refusals


def refusal(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The one form of every refusal, which OpenAI's clients read too."""
    return JSONResponse({"error": {"message": message, "type": kind}}, status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    status, kind = next(
        ((code, kind) for known, code, kind in STATUS if isinstance(error, known)), (400, "bad_request")
    )
    if status == 400 and isinstance(error.__cause__, DBAPIError | sqlite3.Error | OSError):
        status, kind = 503, "registry_unavailable"
    message = printed(str(error))
    if status == 503 and not isinstance(error, Stopping):
        log.error("%s", message)  # whoever runs the server has to do something about it
    if isinstance(error, BadTokens):
        message = (
            "the server's list of tokens cannot be used, so nobody is let in; its log says which file is to be mended"
        )
    headers = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, TryLater):
        headers["Retry-After"] = str(min(600, int(error.seconds + 1)))
    server: Server | None = getattr(request.app.state, "server", None)
    if server is not None:
        server.metrics.refused(kind)
    return refusal(status, kind, message, headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Without what was sent, which may be long, or no text that JSON can express.
    places = [(".".join(map(str, each["loc"][1:])) or str(each["loc"][0]), each["msg"]) for each in error.errors()[:10]]
    message = "; ".join(f"{place}: {text}" for place, text in places)
    return refusal(422, "invalid_request_error", message.encode("utf-8", "replace").decode())


async def _plain(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "not_found" if error.status_code == 404 else "bad_request"
    message = "there is nothing here; see /docs" if error.status_code == 404 else str(error.detail)
    return refusal(error.status_code, kind, message, dict(error.headers or {}))


async def _no_memory(request: Request, error: Exception) -> Response:
    return refusal(
        503, "out_of_memory", "there was not enough memory for this picture; ask for a smaller one, or later"
    )


async def _bug(request: Request, error: Exception) -> Response:
    return refusal(500, "internal_error", "something went wrong that should not; the server's log has it")


# Who asks

_bearer = HTTPBearer(auto_error=False, description="a token of `overpaint token new`")


def server_of(request: Request) -> Server:
    """The server of a request."""
    server: Server = request.app.state.server
    return server


def _needs(role: Role) -> Callable[..., Token]:
    def caller(
        server: Annotated[Server, Depends(server_of)],
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    ) -> Token:
        return server.caller(role, None if credentials is None else credentials.credentials)

    return caller


Served = Annotated[Server, Depends(server_of)]
Reader = Annotated[Token, Depends(_needs("read"))]
Generator = Annotated[Token, Depends(_needs("generate"))]
Changer = Annotated[Token, Depends(_needs("change"))]

router = APIRouter()


# Pictures


@router.post(
    "/v1/generate", response_class=Response, responses={200: {"content": {"image/png": {}}}}, tags=["pictures"]
)
async def generate(body: schemas.PictureBody, request: Request, server: Served, caller: Generator) -> Response:
    """Draw one picture: a PNG file, with the digest of the weights in a header and in its text."""
    wanted = _wanted(body, body.recipe, 1)
    (drawn,) = await _drawn(request, await run_in_threadpool(server.enqueue, caller, wanted))
    content = await run_in_threadpool(png, drawn, server)
    return Response(content, media_type="image/png", headers=_headers([drawn]))


@router.post("/v1/images/generations", tags=["OpenAI"])
async def images(
    body: schemas.ImagesBody, request: Request, response: Response, server: Served, caller: Generator
) -> schemas.ImagesAnswer:
    """Draw pictures as OpenAI's clients ask for them; `model` is a recipe."""
    wanted = _wanted(body, body.model, body.n)
    drawn = await _drawn(request, await run_in_threadpool(server.enqueue, caller, wanted))
    files = [base64.b64encode(await run_in_threadpool(png, each, server)).decode() for each in drawn]
    response.headers.update(_headers(drawn))
    items = [
        schemas.ImageItem(
            b64_json=file,
            weights=each.weights,
            recipe=each.patch_set.recipe,
            revision=each.patch_set.revision,
            seed=each.wanted.seed,
        )
        for file, each in zip(files, drawn, strict=True)
    ]
    height, width, _ = drawn[0].pixels.shape
    return schemas.ImagesAnswer(created=int(time.time()), data=items, size=f"{width}x{height}")


def _wanted(body: schemas.Drawing, recipe: str | None, count: int) -> list[PictureRequest]:
    seed = secrets.randbelow(2**31) if body.seed is None else body.seed
    seeds = [(seed + i) % SEEDS for i in range(count)]
    return [
        PictureRequest(body.prompt, each, body.steps, body.guidance, body.pixels, recipe, body.strengths)
        for each in seeds
    ]


async def _drawn(request: Request, futures: Sequence[Future[Drawn]]) -> list[Drawn]:
    """The pictures, once all are drawn. For a client that has gone, those that still wait are not drawn."""
    waiting = [asyncio.wrap_future(each) for each in futures]
    try:
        while True:
            done, left = await asyncio.wait(waiting, timeout=1.0, return_when=asyncio.FIRST_EXCEPTION)
            if not left or any(each.exception() for each in done):
                for each in done:
                    each.result()
                return [each.result() for each in waiting]
            if await request.is_disconnected():
                raise HTTPException(499, "the client has gone")
    finally:
        for each in waiting:
            if not each.cancel() and not each.cancelled():
                each.exception()  # so that asyncio does not log it as forgotten


def _headers(drawn: Sequence[Drawn]) -> dict[str, str]:
    """What pictures were drawn under; several values only where the recipe was changed between two pictures."""
    headers = {
        "X-Overpaint-Weights": [each.weights for each in drawn],
        "X-Overpaint-Recipe": [quote(each.patch_set.recipe) for each in drawn if each.patch_set.recipe is not None],
        "X-Overpaint-Revision": [str(each.patch_set.revision) for each in drawn if each.patch_set.recipe is not None],
        "X-Overpaint-Seed": [str(drawn[0].wanted.seed)],
    }
    return {name: ", ".join(dict.fromkeys(values)) for name, values in headers.items() if values}


def png(drawn: Drawn, server: Server) -> bytes:
    """A PNG file whose text says how it was drawn and under which weights."""
    wanted, text = drawn.wanted, PngInfo()
    text.add_itxt("prompt", wanted.prompt)
    text.add_text("overpaint:weights", drawn.weights)
    details = {
        "base": server.painter.base.fingerprint,
        "recipe": drawn.patch_set.recipe,
        "revision": drawn.patch_set.revision,
        "patches": dict(drawn.patch_set.strengths),
        "seed": wanted.seed,
        "steps": wanted.steps,
        "guidance": drawn.guidance,
        "version": __version__,
    }
    text.add_itxt("overpaint", canonical_json(details).decode())
    file = io.BytesIO()
    Image.fromarray(drawn.pixels).save(file, "PNG", pnginfo=text)
    return file.getvalue()


@router.get("/v1/models", tags=["OpenAI"])
def models(server: Served, caller: Reader) -> schemas.ModelsAnswer:
    """The recipes of the served base, as OpenAI's clients list models."""
    names = server.painter.base_names
    return schemas.ModelsAnswer(data=[_model(each) for each in server.workspace.recipes() if each.base in names])


@router.get("/v1/models/{model:path}", tags=["OpenAI"])
def model(model: str, server: Served, caller: Reader) -> schemas.ModelItem:
    """One recipe, as OpenAI's clients look a model up."""
    return _model(server.workspace.registry.recipe(model))


def _model(record: RecipeRecord) -> schemas.ModelItem:
    return schemas.ModelItem(id=record.name, created=int(record.created_at.timestamp()))


# Recipes and patches


@router.get("/v1/recipes", tags=["recipes"])
def recipes(server: Served, caller: Reader) -> list[schemas.RecipeSummary]:
    """All recipes of the registry."""
    names = server.painter.base_names
    return [
        schemas.RecipeSummary(
            recipe=each.name,
            base=each.base,
            revision=each.revision,
            weights=each.digest,
            served=each.base in names,
            patches=len(each.entries),
        )
        for each in server.workspace.recipes()
    ]


@router.post("/v1/recipes", status_code=201, tags=["recipes"])
def create(body: schemas.NewRecipe, server: Served, caller: Changer) -> schemas.RecipeItem:
    """Make an empty recipe on the served base."""
    name = server.changeable(caller, body.recipe)
    return _shown(server, server.workspace.create_recipe(name, base=server.painter.base_name).name)


@router.get("/v1/recipes/{recipe:path}", tags=["recipes"])
def show(recipe: str, server: Served, caller: Reader) -> schemas.RecipeItem:
    """One recipe as it is, or as it was at NAME@REVISION."""
    return _shown(server, recipe)


def _shown(server: Server, name: str) -> schemas.RecipeItem:
    record = server.workspace.registry.recipe(name)
    entries = {entry.patch: entry for entry in record.entries}
    return schemas.RecipeItem(
        recipe=record.name,
        base=record.base,
        revision=record.revision,
        weights=record.digest,
        served=record.base in server.painter.base_names,
        tags=dict(record.tags),
        patches=[
            schemas.Entry(
                patch=patch.id,
                concept=patch.concept,
                solver=patch.solver,
                strength=strength,
                expires=entries[patch.id].until if patch.id in entries else None,
            )
            for patch, strength in server.workspace.recipe(f"{record.name}@{record.revision}").patches()
        ],
    )


@router.get("/v1/history/{recipe:path}", tags=["recipes"])
def history(recipe: str, server: Served, caller: Reader) -> list[schemas.HistoryItem]:
    """Every change of a recipe: what, who, when and why; oldest first."""
    return [_line(each) for each in server.workspace.registry.log(recipe)]


@router.get("/v1/expired", tags=["recipes"])
def expired(
    server: Served, caller: Reader, recipe: Annotated[str | None, Query(max_length=1000)] = None
) -> list[schemas.ExpiredItem]:
    """The patches that have expired and are there still, on all recipes or on one."""
    return [
        schemas.ExpiredItem(recipe=each.recipe, concept=each.concept, patch=each.patch, expires=each.until)
        for each in server.workspace.due(recipe=recipe)
    ]


@router.post("/v1/add/{recipe:path}", tags=["recipes"])
def add(recipe: str, body: schemas.AddBody, server: Served, caller: Changer) -> schemas.ChangeAnswer:
    """Add patches to a recipe in one revision, or change their strengths. Repeating the call changes nothing more."""
    return _changed(server, server.changeable(caller, recipe), _add(body, caller))


@router.post("/v1/remove/{recipe:path}", tags=["recipes"])
def remove(recipe: str, body: schemas.RemoveBody, server: Served, caller: Changer) -> schemas.ChangeAnswer:
    """Remove patches from a recipe in one revision: the weights are restored."""
    patches = dict.fromkeys(body.patches)
    name = server.changeable(caller, recipe)
    return _changed(server, name, lambda changed: changed.remove_all(patches, why=body.why, who=caller.owner))


@router.post("/v1/undo/{recipe:path}", tags=["recipes"])
def undo(recipe: str, body: schemas.UndoBody, server: Served, caller: Changer) -> schemas.ChangeAnswer:
    """Take the newest change of a recipe back, as a new revision."""
    name = server.changeable(caller, recipe)
    return _changed(server, name, lambda changed: changed.undo(why=body.why, who=caller.owner))


@router.post("/v1/takedown", tags=["recipes"])
def takedown(body: schemas.AddBody, server: Served, caller: Changer) -> schemas.TakedownAnswer:
    """Add patches to every recipe of the served base that the token is for; repeating the call changes nothing more.

    The answer names the recipes that could not be changed, with the reason.
    """
    base_name, names = server.painter.names_now()
    for patch in body.patches:
        server.workspace.registry.patch(patch, base=base_name)
    answer = schemas.TakedownAnswer(changed=[], failed={})
    for record in server.workspace.recipes():
        if record.base in names and caller.may_use(record.name):
            try:
                answer.changed.append(_changed(server, record.name, _add(body, caller)))
            except OverpaintError as error:
                answer.failed[record.name] = printed(str(error))
    return answer


@router.post("/v1/expired/remove", tags=["recipes"])
def remove_expired(
    server: Served, caller: Changer, recipe: Annotated[str | None, Query(max_length=1000)] = None
) -> list[schemas.HistoryItem]:
    """Remove the patches that have expired, from all recipes that the token is for, or from one."""
    if recipe is not None:
        names = [server.changeable(caller, recipe)]
    else:
        names = [each for each in dict.fromkeys(due.recipe for due in server.workspace.due()) if caller.may_use(each)]
    return [_line(each) for name in names for each in server.workspace.remove_expired(recipe=name, who=caller.owner)]


def _add(body: schemas.AddBody, caller: Token) -> Callable[[Recipe], list[HistoryRecord]]:
    patches = dict.fromkeys(body.patches)

    def change(recipe: Recipe) -> list[HistoryRecord]:
        return recipe.add_all(patches, body.strength, why=body.why, who=caller.owner, until=body.expires, exist_ok=True)

    return change


def _changed(server: Server, name: str, change: Callable[[Recipe], list[HistoryRecord]]) -> schemas.ChangeAnswer:
    lines = change(server.workspace.recipe(name))
    record = server.workspace.registry.recipe(f"{name}@{lines[0].revision}" if lines else name)
    return schemas.ChangeAnswer(
        recipe=record.name,
        revision=record.revision,
        weights=lines[0].digest_after if lines else record.digest,
        changes=[_line(each) for each in lines],
    )


def _line(record: HistoryRecord) -> schemas.HistoryItem:
    return schemas.HistoryItem(
        recipe=record.recipe,
        revision=record.revision,
        action=record.action,
        source=record.source,
        patch=record.patch,
        concept=record.concept,
        strength=record.strength_after,
        expires=record.until_after,
        who=record.who,
        why=record.why,
        at=record.at,
        weights_before=record.digest_before,
        weights=record.digest_after,
    )


@router.get("/v1/patches", tags=["patches"])
def patches(
    server: Served,
    caller: Reader,
    concept: Annotated[str | None, Query(max_length=1000)] = None,
    solver: Annotated[str | None, Query(max_length=1000)] = None,
    tag: Annotated[str | None, Query(max_length=1000)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
) -> list[schemas.PatchItem]:
    """Patches for the served base, oldest first."""
    records = server.workspace.patches(
        concept=concept, base=server.painter.base_name, solver=solver, tag=tag, limit=limit, offset=offset
    )
    return [_patch(each) for each in records]


@router.get("/v1/patches/{patch:path}", tags=["patches"])
def patch(patch: str, server: Served, caller: Reader) -> schemas.PatchItem:
    """One patch: by its id, the beginning of one, or its concept, of which the newest is meant."""
    return _patch(server.workspace.registry.patch(patch, base=server.painter.base_name))


def _patch(record: PatchRecord) -> schemas.PatchItem:
    return schemas.PatchItem(
        patch=record.id,
        concept=record.concept,
        base=record.base,
        solver=record.solver,
        kind=record.kind,
        settings=record.settings,
        seed=record.seed,
        bytes=record.nbytes,
        solved_at=record.solved_at,
        tags=list(record.tags),
    )


# The server itself


@router.get("/health", tags=["server"])
def health(response: Response, server: Served) -> schemas.Health:
    """Whether this worker draws; 503 when it does not. Needs no token."""
    if not server.queue.is_alive:
        response.status_code = 503
    return schemas.Health(
        status="ok" if server.queue.is_alive else "stopping",
        version=__version__,
        base=server.painter.base_name,
        fingerprint=server.painter.base.fingerprint,
        waiting=len(server.queue),
        pid=os.getpid(),
    )


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}}, tags=["server"])
def metrics(server: Served, caller: Reader) -> Response:
    """Pictures, swaps, seconds and refusals of all workers, for Prometheus."""
    content, kind = server.metrics.page(len(server.queue))
    return Response(content, media_type=kind)


_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Pictures, swaps, seconds and refusals, of one process or of all workers together; what `drawing.Meter` asks for."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._pictures = Counter("overpaint_pictures", "Pictures drawn, by recipe", ["recipe"], registry=registry)
        self._drawing = Histogram("overpaint_draw_seconds", "Drawing one picture", buckets=_SECONDS, registry=registry)
        self._swaps = Histogram(
            "overpaint_swap_seconds", "Changing from one set of patches to another", buckets=_SECONDS, registry=registry
        )
        self._refusals = Counter("overpaint_refusals", "Requests refused, by kind", ["kind"], registry=registry)
        self._waiting = Gauge("overpaint_waiting", "Pictures that wait", registry=registry, multiprocess_mode="livesum")

    def swapped(self, seconds: float) -> None:
        """The weights were changed."""
        self._swaps.observe(seconds)

    def drew(self, recipe: str | None, seconds: float) -> None:
        """A picture was drawn, under a recipe or under patches that were named."""
        self._pictures.labels(recipe or "").inc()
        self._drawing.observe(seconds)

    def refused(self, kind: str) -> None:
        """A request was refused."""
        self._refusals.labels(kind).inc()

    def page(self, waiting: int) -> tuple[bytes, str]:
        """Everything in Prometheus's text format, and its media type."""
        self._waiting.set(waiting)
        registry = self._registry
        if METRICS_FOLDER in os.environ:
            _forget_dead(Path(os.environ[METRICS_FOLDER]))
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry), CONTENT_TYPE_LATEST


def _forget_dead(folder: Path) -> None:
    """A killed worker has no pictures waiting; what it counted stays."""
    for file in folder.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        with suppress(PermissionError):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                mark_process_dead(pid)  # type: ignore[no-untyped-call]
