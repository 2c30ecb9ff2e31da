"""Request bodies and parameters of the collections' routes."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Json,
    Tag,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from serving.protocol.filters import OPERATORS

ALIAS = "twinview"  # names the default encoder, whichever is served
NAME = r"^[A-Za-z0-9_-]{1,64}$"
ID = r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,127}$"
KEY = r"^[^\W\d]\w{0,63}$"  # as filters.py has it
ID_OR_EMPTY = f"^$|{ID}"
PATTERNS = {  # what text of this pattern is, for messages
    NAME: "a name: letters from a to z, digits, _ and -, 1 to 64",
    ID: "an id: letters from a to z, digits, _, -, and . except at the start, 1 to 128",
    ID_OR_EMPTY: "an id that a page ended with",
    KEY: "a key: letters, digits and _, with a letter or _ first, 1 to 64",
}
MAX_EXAMPLES = 100  # in a search, positive and negative each
MOST_SEARCHES = 100  # in one request
MOST_TEXT = 1000  # characters of a text to search by
MODEL = f"Id of an encoder from /v1/models; {ALIAS} is the default encoder."

Number = Annotated[float, Field(strict=True, ge=-1e18, le=1e18)]  # the square of a larger one overflows float32
Whole = Annotated[  # 5.0 is one too, in JSON Schema and here
    int, BeforeValidator(lambda given: int(given) if isinstance(given, float) and given.is_integer() else given)
]
Id = Annotated[str, Field(pattern=ID)]
Key = Annotated[str, Field(pattern=KEY)]
Label = Annotated[
    str,
    Field(max_length=4096, description="A blank one is none."),
    AfterValidator(lambda label: label if label.strip() else None),
]
PartName = Annotated[str, Field(min_length=1, max_length=64)]
Share = Annotated[float, Field(gt=0, lt=1)]
VALUE_TAGS = {str: "~text", bool: "~truth", int: "~whole", float: "~number"}  # messages hide tags that start with ~
EXAMPLE_TAGS = {str: "~id", list: "~vector"}
Value = Annotated[
    Annotated[str, Field(max_length=8192), Tag("~text")]
    | Annotated[bool, Tag("~truth")]
    | Annotated[int, Field(ge=-(2**63), lt=2**63), Tag("~whole")]
    | Annotated[float, Tag("~number")],
    Discriminator(
        lambda value: VALUE_TAGS.get(type(value)),
        custom_error_type="needed",  # mistakes.py makes the sentence
        custom_error_message="text, a number, true or false",
    ),
]
Metadata = Annotated[
    dict[Key, Value],
    BeforeValidator(  # null means that the item has no value for the key
        lambda given: {key: v for key, v in given.items() if v is not None} if isinstance(given, dict) else given,
        json_schema_input_type=dict[Key, Value | None],
    ),
]
Vector = Annotated[
    list[Number],
    Field(fail_fast=True, min_length=1, max_length=65_536, description="The vector: of any length except 0."),
]
Example = Annotated[
    Annotated[Id, Tag("~id")] | Annotated[Vector, Tag("~vector")],
    Discriminator(
        lambda example: EXAMPLE_TAGS.get(type(example)),
        custom_error_type="needed",
        custom_error_message="an id or a vector",
    ),
    Field(description="The id of an item, or a vector."),
]
Examples = Annotated[list[Example], Field(max_length=MAX_EXAMPLES, fail_fast=True)]
Condition = dict[str, object]
PickMethod = Literal["central", "typical", "covering", "diverse"]
OddKind = Literal["outliers", "labels", "broken"]
ANNOTATIONS = ("default", "description", "title")  # the parts of a field's JSON schema that do not say what it accepts


class Strict(BaseModel):
    """Refuses unknown fields. In JSON, null means a field's default: many clients send it for what they do not set."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        found = handler.resolve_ref_schema(handler(schema))
        for name, field in found.get("properties", {}).items():
            kinds = field.get("anyOf") or [{key: value for key, value in field.items() if key not in ANNOTATIONS}]
            if name not in found.get("required", ()) and {"type": "null"} not in kinds:
                annotations = {key: value for key, value in field.items() if key in ANNOTATIONS}
                found["properties"][name] = {**annotations, "anyOf": [*kinds, {"type": "null"}]}
        return found

    @field_validator("*", mode="wrap")
    @classmethod
    def _null_is_the_default(cls, value: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        if value is None and not field.is_required():
            return field.get_default(call_default_factory=True, validated_data={})
        return validate(value)


class ItemFacts(Strict):
    """Facts about an item that the request adds."""

    id: Id | None = Field(
        None, description="By default a hash of the image file, so that the same file is stored only once."
    )
    name: str | None = Field(None, max_length=4096, description="By default the file name.")
    label: Label | None = None
    path: str | None = Field(None, max_length=4096, description="Where the original file is.")
    metadata: Metadata = Field(
        {}, description="Further values to filter by. The values of a key have the same type in all items."
    )


class ItemFactsQuery(Strict):
    """Query parameters for an image that is the whole request body."""

    id: Id | None = None
    name: str | None = Field(None, max_length=4096)
    label: Label | None = None
    path: str | None = Field(None, max_length=4096)
    model: str = Field(ALIAS, description=MODEL)


class ItemFactsForm(BaseModel):
    """The form field that describes the images."""

    metadata: Json[Annotated[list[ItemFacts], Field(fail_fast=True)]] | None = None


class VectorRow(ItemFacts):
    id: Id
    vector: Vector


class VectorRows(Strict):
    """Items whose vectors have been computed elsewhere."""

    model: str = Field(description="Id of the encoder that made the vectors, from /v1/models.")
    items: Annotated[list[VectorRow], Field(fail_fast=True)] = Field(min_length=1)


class ItemChange(Strict):
    """What to change of an item, whose picture and vector stay as they are. Fields that are left out stay too; null
    removes a value (RFC 7396)."""

    id: Id
    name: str | None = Field(None, max_length=4096, description="Null leaves it as it is.")
    label: Label | None = None
    path: str | None = Field(None, max_length=4096, description="Where the original file is.")
    metadata: dict[Key, Value | None] = Field(
        {}, description="The keys to set, or to remove with null. Other keys stay."
    )


class ItemChanges(Strict):
    items: Annotated[list[ItemChange], Field(fail_fast=True)] = Field(min_length=1)


class NewName(Strict):
    name: str = Field(pattern=NAME, description="The new name.")


class AliasTarget(Strict):
    collection: str = Field(pattern=NAME, description="Name of the collection that the alias stands for from now on.")


class Ids(Strict):
    ids: Annotated[list[Id], Field(fail_fast=True)] = Field(min_length=1)


class Copies(Strict):
    collection: str = Field(pattern=NAME, description="Name of the collection that the items are in.")
    ids: Annotated[list[Id], Field(fail_fast=True)] = Field(min_length=1, description="Ids of the items.")


class PickQuery(Strict):
    k: Whole = Field(30, ge=1, le=1000, description="Number of items.")
    method: PickMethod = Field(
        "central",
        description="`central`: the middle of each of k clusters. `typical`: where items are densest in each cluster "
        "(TypiClust). `covering`: those that have most others around them (ProbCover). `diverse`: as different as "
        "possible (k-centre).",
    )
    balanced_by: str | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="A metadata key, or `label`: as many items of each of its values.",
    )
    filter: Condition | None = Field(None, description="Pick only from these, written like the `filter` of a search.")
    labelled_too: bool = Field(False, description="Whether items that have a label can be picked.")
    seed: Whole = Field(0, ge=0, lt=2**31, description="Seed of the clusters.")


class SuggestQuery(Strict):
    k: Whole = Field(30, ge=1, le=1000, description="Number of items.")
    filter: Condition | None = Field(None, description="Only for these, written like the `filter` of a search.")


class OddQuery(Strict):
    kind: OddKind = Field(
        "outliers",
        description="`outliers`: the pictures that are most unlike all others. `labels`: those whose nearest pictures "
        "have another label. `broken`: dark, over-exposed, empty or blurred ones.",
    )
    k: Whole = Field(30, ge=1, le=1000, description="Most items to list.")
    filter: Condition | None = Field(
        None, description="Only these, compared with each other; written like the `filter` of a search."
    )


class CoverageQuery(Strict):
    by: str | None = Field(
        None, pattern=NAME, description="Another collection, or an alias. By default the same one, with `by_filter`."
    )
    filter: Condition | None = Field(
        None, description="Only these items of the collection, written like the `filter` of a search."
    )
    by_filter: Condition | None = Field(None, description="Cover them only by these items of the other.")
    k: Whole = Field(30, ge=1, le=1000, description="Most items to list.")


class SplitQuery(Strict):
    parts: dict[PartName, Share] = Field(
        {"train": 0.8, "validation": 0.1, "test": 0.1},
        min_length=2,
        max_length=100,
        description="The parts by name, each with its share of the items. The shares add up to 1.",
    )
    group_by: str | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="A metadata key, or `label`: items with the same value of it are in the same part.",
    )
    threshold: float | None = Field(
        None, gt=0, le=1, description="Lowest cosine of near-duplicates, by default the collection's own."
    )
    filter: Condition | None = Field(None, description="Divide only these, written like the `filter` of a search.")
    seed: Whole = Field(0, ge=0, lt=2**31, description="Another seed gives another split.")


class SearchQuery(Strict):
    positive: Examples = Field([], description="Examples that results should resemble.")
    negative: Examples = Field([], description="Examples that results should not resemble.")
    text: str | None = Field(
        None,
        max_length=MOST_TEXT,
        description="Words that describe what results should show, as a further positive example. Only for an encoder "
        "whose model card has `text`; what exceeds the `length` there, in tokens, is left out.",
    )
    k: Whole = Field(12, ge=1, le=1000, description="Number of results.")
    filter: Condition | None = Field(
        None,
        description='Conditions on the items, by key: {"label": "shirt", "price": {"gte": 3, "lt": 9}, "colour": '
        f'{{"in": ["red", "blue"]}}}}. Operators: {", ".join(OPERATORS)}. A bare value means eq; null means that the '
        'item has no value for the key. "$or" has a list of filters of which one must hold, "$not" a filter that must '
        "not hold.",
    )
    threshold: float | None = Field(None, ge=-1, le=1, description="Lowest cosine similarity of a result.")
    closer_than: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Instead of `threshold`: 0.99 returns pictures that are more alike to the query than 99 % of "
        "random pairs of the collection's pictures are to each other. Not for searches with negative examples or text.",
    )
    model: str = Field(ALIAS, description=MODEL)


class FilterText(BaseModel):
    """The query parameter that filters a list."""

    filter: Json[Condition] | None = None


class Searches(Strict):
    searches: Annotated[list[SearchQuery], Field(fail_fast=True)] = Field(min_length=1, max_length=MOST_SEARCHES)


class SearchForm(SearchQuery):
    """A search sent as a form; its lists and objects are JSON texts."""

    positive: Json[Examples] = Field(
        [], description="Examples that results should resemble, besides the files in `image`."
    )
    negative: Json[Examples] = []
    filter: Json[Condition] | None = None
