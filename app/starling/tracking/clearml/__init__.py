"""ClearML: its server (`client/`), runs as tasks (`tracker`), datasets (`dataset`), a search over tasks (`search`)."""

DATASET_SCHEME = "clearml://"
"""`clearml://ID` names a dataset of a ClearML server."""
