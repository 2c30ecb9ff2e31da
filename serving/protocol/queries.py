"""What is asked of collections: the bodies and fields of their routes."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Json, Tag

from serving.api.embeddings import ALIAS

NAME = r"^[A-Za-z0-9_-]{1,64}$"
ID = r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}$"
KEY = r"^[A-Za-z_][A-Za-z0-9_]{0,63}$"
MOST_EXAMPLES = 100  # of a search, on each side
MODEL = f"An id of /v1/models, or {ALIAS} for the default."

Number = Annotated[float, Field(ge=-1e18, le=1e18)]  # of more, the square does not fit float32
Id = Annotated[str, Field(pattern=ID)]
KINDS = {str: "~text", bool: "~truth", int: "~whole", float: "~number"}
Value = Annotated[
    Annotated[str, Field(max_length=8192), Tag("~text")]
    | Annotated[bool, Tag("~truth")]
    | Annotated[int, Field(ge=-(2**63), lt=2**63), Tag("~whole")]
    | Annotated[float, Tag("~number")],
    Discriminator(
        lambda given: KINDS.get(type(given)),
        custom_error_type="no_value",
        custom_error_message="must be a text, a number, true or false",
    ),
]
Metadata = dict[Annotated[str, Field(pattern=KEY)], Value]
Vector = Annotated[list[Number], Field(min_length=1, max_length=65_536, description="Of any length but 0.")]
Example = Annotated[
    Annotated[Id, Tag("~id")] | Annotated[Vector, Tag("~vector")],
    Discriminator(lambda given: "~id" if isinstance(given, str) else "~vector"),  # errors.py leaves out such tags
    Field(description="An item's id, or a vector."),
]
Examples = Annotated[list[Example], Field(max_length=MOST_EXAMPLES)]
Condition = dict[str, object]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Facts(Strict):
    """Of one item that is put in."""

    id: Id | None = Field(None, description="By default a hash of the image's file, so that it is there once.")
    name: str | None = Field(None, max_length=4096, description="By default the file's.")
    label: str | None = Field(None, max_length=4096)
    path: str | None = Field(None, max_length=4096, description="Where the original lies.")
    metadata: Metadata = Field({}, description="To filter by. A key has values of one type in all items.")


class FactsQuery(Strict):
    """Of an image that comes as it is, in the query."""

    id: Id | None = None
    name: str | None = Field(None, max_length=4096)
    label: str | None = Field(None, max_length=4096)
    path: str | None = Field(None, max_length=4096)
    model: str = Field(ALIAS, description=MODEL)


class FactsForm(BaseModel):
    """The field beside a form's images."""

    metadata: Json[list[Facts]] | None = None


class Row(Facts):
    id: Id
    vector: Vector


class Rows(Strict):
    """Vectors that are ready."""

    model: str = Field(description="The encoder that has made them: an id of /v1/models.")
    items: list[Row] = Field(min_length=1)


class Ids(Strict):
    ids: list[Id] = Field(min_length=1)


class SearchQuery(Strict):
    positive: Examples = Field([], description="What results are to be like. In a form, the files in `image` too.")
    negative: Examples = Field([], description="What they are to be unlike.")
    k: int = Field(12, ge=1, le=1000)
    filter: Condition | None = Field(
        None,
        description='What must hold, by key: {"label": "shirt", "price": {"gte": 3, "lt": 9}, "colour": {"in": ["red", '
        '"blue"]}}. Operators: eq, ne, gt, gte, lt, lte, in; a bare value is eq, and null a missing one.',
    )
    threshold: float | None = Field(None, ge=-1, le=1, description="The least cosine.")
    model: str = Field(ALIAS, description=MODEL)


class SearchForm(SearchQuery):
    """The same; what is no text or number is JSON."""

    positive: Json[Examples] = []
    negative: Json[Examples] = []
    filter: Json[Condition] | None = None
