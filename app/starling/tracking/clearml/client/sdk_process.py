"""ClearML's SDK in a separate process, for what only the SDK can do: create and fetch datasets.

    python -m starling.tracking.clearml.client.sdk_process fetch ID FOLDER
    python -m starling.tracking.clearml.client.sdk_process create FOLDER PROJECT NAME VERSION [PARENT ...]

The last line of output is JSON. The caller watches the process, and kills it without progress: its retries never end.
"""

from __future__ import annotations

import json
import sys


def fetch(dataset_id: str, folder: str) -> dict[str, str]:
    """Put the files of a dataset, and of its parent datasets, into an empty folder."""
    from clearml import Dataset

    dataset = Dataset.get(dataset_id=dataset_id)
    if not dataset.get_mutable_local_copy(folder, overwrite=True):
        raise RuntimeError("the SDK made no local copy")
    return {
        "id": dataset.id,
        "name": dataset.name,
        "project": dataset.project,
        "version": str(dataset.version or ""),
    }


def create(folder: str, project: str, name: str, version: str, *parents: str) -> dict[str, str | int]:
    """Create a version of a dataset with the content of the folder: create, sync, upload, close."""
    from clearml import Dataset

    dataset = Dataset.create(
        dataset_name=name,
        dataset_project=project,
        dataset_version=version or None,
        parent_datasets=list(parents) or None,
    )
    removed, added, modified = dataset.sync_folder(folder, verbose=False)
    dataset.upload(show_progress=False)
    if not dataset.finalize():
        raise RuntimeError("the SDK could not finalize it")
    return {
        "id": dataset.id,
        "name": name,
        "project": project,
        "version": str(dataset.version or ""),
        "added": added,
        "modified": modified,
        "removed": removed,
    }


if __name__ == "__main__":
    action, *words = sys.argv[1:]
    print(json.dumps(fetch(*words) if action == "fetch" else create(*words)), flush=True)
