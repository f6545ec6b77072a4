"""Files that once made a reader fail, hang or take memory: each is read in a process of its own, within bounds.

`corpus/KIND/NAME` is one input. A new one is added by putting the file there; larger ones are built where they are tried.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.security.bounded import read_all

CORPUS = Path(__file__).parent / "corpus"
READERS = {
    "annotations": """
from starling.data.fetch.converters import CONVERTERS
def read_any(path):
    kind = path.name.partition(".")[0]
    root = path.with_name(path.name + ".in")
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages", "annotations"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Main/train.txt").write_text("a\\n")
    (root / "JPEGImages/a.jpg").write_bytes(b"")
    places = {"voc": "Annotations/a.xml", "visdrone": "annotations/a.txt"}
    (root / places.get(kind, "a.json")).write_bytes(path.read_bytes())
    told = {"voc": {"source": ".", "split": "train", "into": "train"}, "visdrone": {"source": "."}}
    CONVERTERS[kind](root, ["a"], **told.get(kind, {"source": "a.json", "images": "images"}))
""",
    "archives": """
from starling.data.fetch.archive import unpack
def read_any(path):
    unpack(path, path.with_name(path.name + ".in"))
""",
    "events": """
from starling.tracking.events import last_event, read_events
def read_any(path):
    last_event(path)
    read_events(path)
""",
    "images": """
from starling.data.dataset.images import decode_image, read_header
def read_any(path):
    read_header(path)
    decode_image(path)
""",
    "journals": """
from starling.search.study import SearchStudy
def read_any(path):
    folder = path.with_name(path.name + ".in")
    folder.mkdir()
    (folder / "study.journal").write_bytes(path.read_bytes())
    read = SearchStudy.read(folder)
    read.progress()
    read.finished()
""",
    "labels": """
from starling.data.dataset.labels import read_labels
def read_any(path):
    read_labels(path, 80)
""",
    "pickles": """
from starling.model.checkpoint import load_checkpoint
from starling.model.initial_weights import read_weights
def read_any(path):
    try:
        load_checkpoint(path)
    except StarlingError:
        pass
    read_weights(path)
""",
    "yaml": """
from starling.core.errors import StarlingError
from launcher.options.training_files import read_dataset
from starling.data.dataset.dataset import DatasetDescription
def read_any(path):
    try:
        read_dataset(path)
    except StarlingError:
        pass
    DatasetDescription.from_yaml(path)
""",
}


def test_every_folder_of_the_corpus_has_a_reader_and_files() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} == set(READERS)
    assert all(len(list(folder.iterdir())) >= 5 for folder in CORPUS.iterdir())


@pytest.mark.parametrize("kind", READERS)
def test_what_failed_once_is_read_or_refused_in_one_message(tmp_path: Path, kind: str) -> None:
    copies = Path(shutil.copytree(CORPUS / kind, tmp_path / kind))
    (tmp_path / kind / "images").mkdir(exist_ok=True)
    paths = sorted(path for path in copies.iterdir() if path.is_file())
    imports = f"from starling.errors import StarlingError\n{READERS[kind]}"
    assert len(read_all(paths, ["read_any"], imports=imports)) == len(paths)
