"""The client of the service: `Client` for scripts, `AsyncClient` for servers and pages, with the same methods.

    client = Client("http://127.0.0.1:3000")
    client.search("cat.jpg", k=5).results[0].name

A picture is a path, encoded bytes, or a PIL image. A request that the service refuses raises ServiceError with the
service's own message. While the service is busy, the clients wait for as long as it says and try again a few times.

`embed`, `classify` and `put_items` take any number of pictures and send them in packs, one request after the other.
"""

from serving.client.async_client import AsyncClient
from serving.client.messages import COLLECTION
from serving.client.sync_client import Client
from serving.protocol.replies import (
    Alias,
    Change,
    Changed,
    Classified,
    Collection,
    Copied,
    Curve,
    Curves,
    Deleted,
    DerivedProgress,
    DerivedResult,
    Drift,
    Duplicates,
    Embeddings,
    Followed,
    Guess,
    Invariance,
    Item,
    Items,
    ItemWithVector,
    Key,
    Map,
    Match,
    Matches,
    Matrix,
    MatrixPicture,
    Pair,
    Picked,
    Put,
    PutItem,
    Reembedding,
    Run,
    RunDetails,
    ServiceError,
    Skipped,
    Suggested,
    SuggestedItem,
    Undone,
)

__all__ = [
    "COLLECTION",
    "Alias",
    "AsyncClient",
    "Change",
    "Changed",
    "Classified",
    "Client",
    "Collection",
    "Copied",
    "Curve",
    "Curves",
    "Deleted",
    "DerivedProgress",
    "DerivedResult",
    "Drift",
    "Duplicates",
    "Embeddings",
    "Followed",
    "Guess",
    "Invariance",
    "Item",
    "ItemWithVector",
    "Items",
    "Key",
    "Map",
    "Match",
    "Matches",
    "Matrix",
    "MatrixPicture",
    "Pair",
    "Picked",
    "Put",
    "PutItem",
    "Reembedding",
    "Run",
    "RunDetails",
    "ServiceError",
    "Skipped",
    "Suggested",
    "SuggestedItem",
    "Undone",
]
