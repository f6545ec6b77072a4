"""What a worker keeps set up while its candidates differ in image size or layout."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from starling.config.hyp import Hyp
from starling.config.shipped import find_config
from starling.config.yaml_reader import read_yaml
from starling.core.errors import UsageError
from starling.core.settings.train import TrainConfig
from starling.model.detector import Detector
from starling.model.initial_weights import InitialWeights, check_freeze, find_initial_weights
from starling.prediction.inputs import fit_stride
from starling.search.space_file import Space, changed
from starling.training.training import TrainingSetup, open_setup


class TrainingSetups:
    """The setup that a candidate's settings need: the usual one, or another that shares what it can.

    Data are decoded for one image size. Those that lie in a file which all containers map are kept for every size
    that was asked for; those in this process's memory or on its GPU only for the latest, as two would not fit.
    """

    def __init__(self, config: TrainConfig, hyp: Hyp, say: Callable[[str], None]) -> None:
        """Open the usual setup; what can be wrong with device or data is found here."""
        self._hyp, self._say = hyp, say
        usual = open_setup(config, find_initial_weights(config.weights, config.cfg), hyp, say)
        self._config = usual.config
        self._held = {self._key(usual.config): usual}

    @property
    def usual(self) -> TrainingSetup:
        """The setup of the settings that the worker was started with, its batch size chosen where it was open."""
        return self.of({})

    def of(self, settings: Mapping[str, int | str]) -> TrainingSetup:
        """Return the setup of the usual settings but for `settings`, fields of TrainConfig."""
        config = changed(self._config, settings)
        key = self._key(config)
        if key not in self._held:
            self._held[key] = self._open(config)
        return replace(self._held[key], config=config)

    @staticmethod
    def _key(config: TrainConfig) -> tuple[int, str]:
        return config.imgsz, config.cfg

    def _open(self, config: TrainConfig) -> TrainingSetup:
        start = find_initial_weights(config.weights, config.cfg)
        size = fit_stride(config.imgsz, image_multiple(start), self._say)
        alike = next((shop for shop in self._held.values() if shop.image_size == size), None)
        if alike is not None:
            return replace(alike, config=config, start=start)
        self._held = {key: shop for key, shop in self._held.items() if _is_mapped(shop)}
        return open_setup(config, start, self._hyp, self._say)


def _is_mapped(setup: TrainingSetup) -> bool:
    """Return whether the decoded pictures take no memory of this process's own."""
    stores = (setup.data.train_images, setup.data.val_images)
    return all(store.mode == "disk" and not store.on_device for store in stores)


def image_multiple(start: InitialWeights) -> int:
    """Return what image sides of a layout must be a multiple of, in pixels; raises UsageError for one that is none."""
    return _probe(start).image_multiple


def _probe(start: InitialWeights) -> Detector:
    return InitialWeights(start.layout, None).build(("any",), None, lambda line: None)


def check_layouts(space: Space, config: TrainConfig) -> None:
    """Build every layout that is searched once; raises UsageError naming one that cannot be built."""
    for choice in (c for s in space.settings if s.name == "cfg" for c in s.choices):
        try:
            probe = _probe(find_initial_weights(config.weights, str(choice)))
            check_freeze(probe, config.freeze)
        except UsageError as error:
            raise UsageError(f"{config.space}: cfg: {choice}: {error}") from None


def searched_layouts(space: Space) -> dict[str, str]:
    """Return a digest of every layout that is searched: two workers' files of one name may differ."""
    choices = [str(choice) for s in space.settings if s.name == "cfg" for choice in s.choices]
    return {choice: layout_digest(read_yaml(find_config("layouts", choice))) for choice in choices}


def layout_digest(layout: Mapping[str, Any]) -> str:
    """Return eight hexadecimal digits that differ where layouts do."""
    return f"{zlib.crc32(repr(layout).encode()):08x}"
