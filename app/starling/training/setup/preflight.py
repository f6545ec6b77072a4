"""Check a training on this machine before anything is downloaded for it."""

from __future__ import annotations

from starling.config.shipped import find_config
from starling.config.yaml_reader import read_yaml
from starling.core.errors import DataError
from starling.core.settings.train import TrainConfig
from starling.data.dataset.dataset import DatasetDescription
from starling.data.dataset.image_lists import find_images
from starling.data.fetch.find import find_dataset
from starling.device import check_device
from starling.model.initial_weights import InitialWeights, check_freeze, local_weights
from starling.model.official import official_name
from starling.outputs.bucket import check_driver
from starling.outputs.run_dir import check_project, runs_root
from starling.tracking.clearml import DATASET_SCHEME


def check_before_fetching(config: TrainConfig) -> None:
    """Raise the errors that a training would raise later, before published weights are fetched.

    Checks the bucket and the project always. If weights are to be fetched, also checks the device, the layout with
    `--freeze`, and the dataset unless the dataset is to be fetched too.
    """
    check_driver(config.bucket)
    check_project(config.run_project, runs_root())
    if not config.weights or local_weights(config.weights) is not None:
        return
    if len(config.devices) < 2:
        check_device(config.device)
    layout = config.cfg or f"{str(official_name(config.weights)).removesuffix('.pt')}.yaml"
    probe = InitialWeights(read_yaml(find_config("layouts", layout)), None).build(("any",), None)
    check_freeze(probe, config.freeze)
    check_dataset(config.data, single_cls=config.single_cls, fetched=config.download)


def check_dataset(data: str, *, single_cls: bool = False, fetched: bool = False) -> None:
    """Read a local dataset description, and look for an image of every split.

    Raises UsageError for an error in the description; DataError for missing files, unless they are to be `fetched`.
    """
    if data.startswith(DATASET_SCHEME):
        return
    path = find_dataset(data)
    try:
        description = DatasetDescription.from_yaml(path, single_cls=single_cls)
        for split in ("train", "val"):
            source = f"{path}: {split}"
            entries = description.splits.get(split, ())
            if not find_images(entries, description.root, source).images:
                raise DataError(f"{source}: no images there; check the path")
    except DataError:
        if not fetched:
            raise
