"""How /docs groups the routes: the groups in their order, and each route with a short sentence about it."""

GROUPS: dict[str, dict[str, str]] = {  # by the names of the routes' functions
    "Search": {
        "search": "Find the items most similar to images, items or vectors",
        "search_many": "Answer several searches at once",
        "pick": "Pick the items to label first",
        "suggest": "Suggest labels",
        "odd": "List the odd items",
    },
    "Items": {
        "put_items": "Add images, or vectors of images",
        "items": "List items",
        "item": "Get an item",
        "thumbnail": "Get an item's small picture",
        "original": "Get an item's large picture",
        "change_items": "Change names, labels, paths and metadata",
        "copy_items": "Put items of another collection into this one",
        "delete_items": "Delete items",
        "delete_item": "Delete an item",
    },
    "Changes": {
        "changes": "List what was changed",
        "undo": "Undo a change",
    },
    "Duplicates and map": {
        "duplicates": "Get the near-duplicates",
        "compute_duplicates": "Look for near-duplicates",
        "map_": "Get the map",
        "compute_map": "Compute the map",
    },
    "Collections": {
        "collections": "List the collections",
        "collection": "Get a collection",
        "create_collection": "Create a collection",
        "rename_collection": "Rename a collection",
        "delete_collection": "Delete a collection",
        "keys": "List what items can be filtered by",
        "drift": "Ask whether new pictures look like it",
        "verify": "Look for damage",
        "aliases": "List the aliases",
        "set_alias": "Let an alias stand for a collection",
        "delete_alias": "Delete an alias",
    },
    "Another encoder": {
        "reembed": "Embed a collection again",
        "reembedding": "Get the progress",
        "stop_reembedding": "Stop embedding a collection again",
    },
    "Vectors and classes of images": {
        "embed": "Embed images",
        "create_embeddings": "Embed images, as OpenAI's API does",
        "classify": "Name the likeliest classes of images",
        "describe": "Describe the encoder to LightlyStudio",
        "embed_image_bytes": "Embed images for LightlyStudio",
    },
    "What the encoder sees": {
        "views": "Draw pairs of augmented views",
        "matrix": "Compare the views of a small batch",
        "invariance": "Measure which changes the encoder ignores",
    },
    "Training runs": {
        "runs": "List the training runs",
        "run": "Get a training run",
    },
    "Service": {
        "models": "List the encoders that are served",
        "model": "Get an encoder",
        "readyz": "Check that images can be embedded",
        "livez": "Check that the process answers",
        "metrics": "Get the metrics for Prometheus",
    },
}
