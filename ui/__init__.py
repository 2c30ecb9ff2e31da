from export import silence  # noqa: F401  before any library is imported
