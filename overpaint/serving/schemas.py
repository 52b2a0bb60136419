"""What the server's requests and answers look like, as JSON; FastAPI makes the OpenAPI page of it."""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from overpaint.core.errors import OverpaintError
from overpaint.core.names import LONGEST_NAME, LONGEST_NOTE, SEEDS, checked_note, parsed_day, shown

LONGEST_PROMPT = 2000
MOST_PICTURES = 10
MOST_PATCHES = 1000


def _printing(text: str) -> str:
    try:
        return checked_note(text, "a text")
    except OverpaintError as error:
        raise ValueError(str(error)) from None


def _written_day(value: Any) -> Any:
    """Only YYYY-MM-DD: pydantic would take a number for seconds since 1970, and a moment for its day."""
    if isinstance(value, str):
        try:
            return parsed_day(value, "a day")
        except OverpaintError as error:
            raise ValueError(str(error)) from None
    if value is None or isinstance(value, date):
        return value
    raise ValueError(f"a day is written YYYY-MM-DD; got {shown(value)}")


Day = Annotated[date, BeforeValidator(_written_day)]
Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME), AfterValidator(_printing)]
Prompt = Annotated[str, Field(max_length=LONGEST_PROMPT), AfterValidator(_printing)]
Reason = Annotated[str, Field(max_length=LONGEST_NOTE), AfterValidator(_printing)]
Strength = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False, strict=True)]
Size = Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description="WIDTHxHEIGHT, or auto")]


class Body(BaseModel):
    """A request's body. A field that it does not have is refused, so that no misspelt setting goes unnoticed."""

    model_config = ConfigDict(extra="forbid")


class PatchStrength(Body):
    """A patch (its id, the beginning of one, or its concept) and how strongly it is applied."""

    patch: Name
    strength: Strength = 1.0


class Drawing(Body):
    """What every picture is asked for with."""

    prompt: Prompt
    seed: int | None = Field(
        None, ge=0, lt=SEEDS, strict=True, description="of the first picture; chosen at random if omitted"
    )
    steps: int = Field(20, ge=1, le=1000, strict=True)
    guidance: float | None = Field(
        None, ge=0, le=100, allow_inf_nan=False, strict=True, description="omitted: the base's own"
    )
    size: Size | None = None
    patches: list[PatchStrength] | None = Field(None, max_length=MOST_PATCHES, description="instead of a recipe")

    @property
    def pixels(self) -> tuple[int, int] | None:
        """(width, height); None for the base's own."""
        if self.size in (None, "auto"):
            return None
        width, _, height = str(self.size).partition("x")
        return int(width), int(height)

    @property
    def strengths(self) -> tuple[tuple[str, float], ...]:
        """The patches that are named, with strengths."""
        return tuple((each.patch, each.strength) for each in self.patches or ())


class PictureBody(Drawing):
    """One picture, under a recipe (NAME or NAME@REVISION) or under patches with strengths; `patches: []` is the base."""

    recipe: Name | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> PictureBody:
        if (self.recipe is None) == (self.patches is None):
            raise ValueError("name a recipe or a list of patches, one of the two")
        return self


class ImagesBody(Drawing):
    """OpenAI's request for pictures; `model` is a recipe. `seed`, `steps`, `guidance` and `patches` are this server's own.

    Of what OpenAI's clients may send beside, `quality`, `style`, `background`, `moderation`, `output_compression` and `user`
    change nothing here.
    """

    model: Name | None = Field(None, description="a recipe, NAME or NAME@REVISION")
    n: int = Field(1, ge=1, le=MOST_PICTURES, strict=True)
    response_format: Literal["b64_json"] | None = Field(None, description="always b64_json: this server keeps no files")
    output_format: Literal["png"] | None = None
    stream: Literal[False] | None = None
    quality: str | None = Field(None, max_length=100)
    style: str | None = Field(None, max_length=100)
    background: str | None = Field(None, max_length=100)
    moderation: str | None = Field(None, max_length=100)
    output_compression: int | None = Field(None, ge=0, le=100)
    partial_images: Literal[0] | None = None
    user: str | None = Field(None, max_length=1000)

    @model_validator(mode="after")
    def _one_of_two(self) -> ImagesBody:
        if (self.model is None) == (self.patches is None):
            raise ValueError("name a recipe as the model, or a list of patches, one of the two")
        return self


class ImageItem(BaseModel):
    """One picture: a PNG file in base64, and what it was drawn under."""

    b64_json: str
    weights: str = Field(description="digest of the weights that drew it")
    recipe: str | None
    revision: int | None
    seed: int


class ImagesAnswer(BaseModel):
    """OpenAI's answer, with this server's own `weights`, `recipe`, `revision` and `seed` in each item."""

    created: int
    data: list[ImageItem]
    output_format: Literal["png"] = "png"
    size: str


class ModelItem(BaseModel):
    """A recipe as OpenAI's clients list models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "overpaint"


class ModelsAnswer(BaseModel):
    """All recipes of the served base."""

    object: Literal["list"] = "list"
    data: list[ModelItem]


class Entry(BaseModel):
    """A patch on a recipe."""

    patch: str
    concept: str
    solver: str
    strength: float
    expires: date | None


class RecipeItem(BaseModel):
    """A recipe at a revision. `weights` is the digest as the history has it; `served`, whether this server draws with it."""

    recipe: str
    base: str
    revision: int
    weights: str | None
    served: bool
    tags: dict[str, int]
    patches: list[Entry]


class RecipeSummary(BaseModel):
    """A recipe in a list."""

    recipe: str
    base: str
    revision: int
    weights: str | None
    served: bool
    patches: int


class PatchItem(BaseModel):
    """A stored patch."""

    patch: str
    concept: str
    base: str
    solver: str
    kind: str
    settings: dict[str, Any]
    seed: int
    bytes: int
    solved_at: datetime
    tags: list[str]


class HistoryItem(BaseModel):
    """What one revision did to one patch, by whom and why."""

    recipe: str
    revision: int
    action: str
    source: str | None
    patch: str | None
    concept: str | None
    strength: float | None
    expires: date | None
    who: str
    why: str
    at: datetime
    weights_before: str | None
    weights: str | None


class ExpiredItem(BaseModel):
    """A patch that has expired and is on the recipe still."""

    recipe: str
    concept: str
    patch: str
    expires: date


class NewRecipe(Body):
    """A new, empty recipe on the served base."""

    recipe: Name


class AddBody(Body):
    """Patches to add (ids, beginnings of ids, concepts), all in one revision."""

    patches: list[Name] = Field(min_length=1, max_length=MOST_PATCHES)
    strength: Strength = 1.0
    expires: Day | None = Field(None, description="the day from which they have expired; omitted: never, or as before")
    why: Reason = ""


class RemoveBody(Body):
    """Patches to remove, all in one revision."""

    patches: list[Name] = Field(min_length=1, max_length=MOST_PATCHES)
    why: Reason = ""


class UndoBody(Body):
    """Why the newest change is undone."""

    why: Reason = ""


class ChangeAnswer(BaseModel):
    """What a change came to; no changes where all was so already."""

    recipe: str
    revision: int
    weights: str | None
    changes: list[HistoryItem]


class TakedownAnswer(BaseModel):
    """What a takedown came to, recipe by recipe; `failed` has a sentence for each recipe that could not be changed."""

    changed: list[ChangeAnswer]
    failed: dict[str, str]


class Health(BaseModel):
    """Whether this worker draws, and with what."""

    status: Literal["ok", "stopping"]
    version: str
    base: str
    fingerprint: str
    waiting: int
    pid: int


class ErrorDetail(BaseModel):
    """One sentence, and what kind of refusal it is."""

    message: str
    type: str


class ErrorAnswer(BaseModel):
    """What every refusal looks like."""

    error: ErrorDetail
