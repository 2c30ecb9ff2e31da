"""Request bodies and parameters of the collections' routes."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Json, Tag

from serving.protocol.filters import OPERATORS

ALIAS = "twinview"  # names the default encoder, whichever is served
NAME = r"^[A-Za-z0-9_-]{1,64}$"
ID = r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}$"
KEY = r"^[A-Za-z_][A-Za-z0-9_]{0,63}$"
MAX_EXAMPLES = 100  # in a search, positive and negative each
MODEL = f"Id of an encoder from /v1/models; {ALIAS} is the default encoder."

Number = Annotated[float, Field(ge=-1e18, le=1e18)]  # the square of a larger one overflows float32
Id = Annotated[str, Field(pattern=ID)]
VALUE_TAGS = {str: "~text", bool: "~truth", int: "~whole", float: "~number"}  # errors.py hides tags that start with ~
Value = Annotated[
    Annotated[str, Field(max_length=8192), Tag("~text")]
    | Annotated[bool, Tag("~truth")]
    | Annotated[int, Field(ge=-(2**63), lt=2**63), Tag("~whole")]
    | Annotated[float, Tag("~number")],
    Discriminator(
        lambda value: VALUE_TAGS.get(type(value)),
        custom_error_type="no_value",
        custom_error_message="must be a text, a number, true or false",
    ),
]
Metadata = dict[Annotated[str, Field(pattern=KEY)], Value]
Vector = Annotated[
    list[Number], Field(min_length=1, max_length=65_536, description="The vector: of any length except 0.")
]
Example = Annotated[
    Annotated[Id, Tag("~id")] | Annotated[Vector, Tag("~vector")],
    Discriminator(lambda example: "~id" if isinstance(example, str) else "~vector"),
    Field(description="The id of an item, or a vector."),
]
Examples = Annotated[list[Example], Field(max_length=MAX_EXAMPLES)]
Condition = dict[str, object]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class ItemFacts(Strict):
    """Facts about an item that the request adds."""

    id: Id | None = Field(
        None, description="By default a hash of the image file, so that the same file is stored only once."
    )
    name: str | None = Field(None, max_length=4096, description="By default the file name.")
    label: str | None = Field(None, max_length=4096)
    path: str | None = Field(None, max_length=4096, description="Where the original file is.")
    metadata: Metadata = Field(
        {}, description="Further values to filter by. The values of a key have the same type in all items."
    )


class ItemFactsQuery(Strict):
    """Query parameters for an image that is the whole request body."""

    id: Id | None = None
    name: str | None = Field(None, max_length=4096)
    label: str | None = Field(None, max_length=4096)
    path: str | None = Field(None, max_length=4096)
    model: str = Field(ALIAS, description=MODEL)


class ItemFactsForm(BaseModel):
    """The form field that describes the images."""

    metadata: Json[list[ItemFacts]] | None = None


class VectorRow(ItemFacts):
    id: Id
    vector: Vector


class VectorRows(Strict):
    """Items whose vectors have been computed elsewhere."""

    model: str = Field(description="Id of the encoder that made the vectors, from /v1/models.")
    items: list[VectorRow] = Field(min_length=1)


class Ids(Strict):
    ids: list[Id] = Field(min_length=1)


class SearchQuery(Strict):
    positive: Examples = Field(
        [], description="Examples that results should resemble. In a form, the files in `image` are such examples too."
    )
    negative: Examples = Field([], description="Examples that results should not resemble.")
    k: int = Field(12, ge=1, le=1000, description="Number of results.")
    filter: Condition | None = Field(
        None,
        description='Conditions on the items, by key: {"label": "shirt", "price": {"gte": 3, "lt": 9}, "colour": '
        f'{{"in": ["red", "blue"]}}}}. Operators: {", ".join(OPERATORS)}. A bare value means eq; null means that the '
        "item has no value for the key.",
    )
    threshold: float | None = Field(None, ge=-1, le=1, description="Lowest cosine similarity of a result.")
    closer_than: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Instead of `threshold`: 0.99 returns pictures that are more alike to the query than 99 % of "
        "random pairs of the collection's pictures are to each other. Not for searches with negative examples.",
    )
    model: str = Field(ALIAS, description=MODEL)


class SearchForm(SearchQuery):
    """A search sent as a form; its lists and objects are JSON texts."""

    positive: Json[Examples] = []
    negative: Json[Examples] = []
    filter: Json[Condition] | None = None
