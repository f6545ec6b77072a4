"""What is written of one source never meets what is written of another, and plain names stay plain."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import cv2
import pytest

from starling.cli.detect import main as detect_main
from starling.cli.val import main as val_main
from starling.evaluation.coco import image_ids
from starling.outputs.names import Named, Names, Subject, numbered
from starling.outputs.register import Register
from tests.conftest import CELL_DETECTOR, MINI_SET

WEIGHTS = str(CELL_DETECTOR)
IMAGES = sorted((MINI_SET / "images" / "val").glob("*.jpg"))
FRAMES, CROPS = range(4), range(1, 5)


def subjects(*paths: str) -> list[Subject]:
    """Return sources by their paths; an .mp4 is a film."""
    return numbered([
        Subject(identity=path, file_name=path.rsplit("/", 1)[-1], film=path.endswith(".mp4")) for path in paths
    ])  # fmt: skip


def named(paths: Sequence[str], *, folds: bool = False) -> dict[str, Named]:
    names = Names(folds=folds)
    names.give(subjects(*paths))
    return names.given


def files(one: Named) -> set[str]:
    """Return the names of all labels and crops that a source may write."""
    frames = FRAMES if one.film else range(1)
    return {f"labels/{one.stem(frame)}" for frame in frames} | {
        f"crops/{one.crop(frame, number)}" for frame in frames for number in CROPS
    }


AWKWARD = [
    "a.jpg", "a.png", "b/a.jpg", "a-2.jpg", "a-3.jpg", "a-2-2.jpg", "a-.jpg", "a--2.jpg", "scan.jpg", "scan-2.jpg",
    "film.mp4", "film_0.jpg", "film_1.png", "film_0-2.jpg", "film_0_1.jpg", "film_0.mp4", "b/film.mp4", "film.jpg",
    "_0.jpg", "_.mp4", "1.jpg", "01.jpg", "a_0.jpg", "a.mp4", "a_1-2.jpg", "a_1.mp4", ".jpg", "A.jpg", "film_00.jpg",
    "a/clip_0.jpg", "clip.mp4", "a/clip_1-2.jpg",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_no_two_sources_write_one_file_whatever_their_names_and_their_order(seed: int) -> None:
    order = AWKWARD[:]
    random.Random(seed).shuffle(order)
    given = named(order)
    assert given == named(sorted(AWKWARD))
    every = [name for one in given.values() for name in files(one)]
    assert len(every) == len(set(every))


def test_names_that_meet_no_other_are_those_of_the_file() -> None:
    given = named(
        ["a.jpg", "b-1.jpg", "b.jpg", "c-02.jpg", "c.jpg", "film.mp4", "film.jpg", "film_x.jpg", "d_7.jpg"]
    )
    assert [(path, one.base) for path, one in given.items() if one.base != path[:-4]] == []
    assert not [one for one in given.values() if one.addition]
    film, image = given["film.mp4"], given["a.jpg"]
    assert (film.stem(0), film.crop(7, 1), film.crop(7, 2)) == ("film_0", "film_7", "film_7-2")
    assert (image.stem(0), image.crop(0, 1), image.crop(0, 3)) == ("a", "a", "a-3")


def test_two_images_whose_labels_do_not_meet_keep_their_label_names_and_only_crops_differ() -> None:
    given = named(["scan.jpg", "scan-2.jpg"])
    assert [one.base for one in given.values()] == ["scan-2", "scan"]
    assert given["scan.jpg"].crop(0, 1) == "scan"
    assert given["scan.jpg"].crop(0, 2) != "scan-2"


def test_the_addition_of_a_source_does_not_change_when_other_sources_come() -> None:
    few, many = named(["x/a.jpg", "z/a.jpg"]), named(["x/a.jpg", "y/a.jpg", "z/a.jpg"])
    assert few["z/a.jpg"] == many["z/a.jpg"]


def test_one_file_named_twice_is_two_sources() -> None:
    given = named(["a.jpg", "a.jpg"])
    assert len({one.base for one in given.values()}) == 2


def test_case_tells_sources_apart_only_where_the_file_system_does() -> None:
    paths = ["A.jpg", "a.jpg", "Film_0.jpg", "film.mp4", "e\u0301.jpg", "\u00e9.jpg"]
    assert {one.base for one in named(paths).values()} == {"A", "a", "Film_0", "film", "e\u0301", "\u00e9"}
    folded = named(paths, folds=True)
    every = [name.casefold() for one in folded.values() for name in files(one)]
    assert len(every) == len(set(every))
    assert len(folded["\u00e9.jpg"].base) > 1 or len(folded["e\u0301.jpg"].base) > 2


@pytest.mark.parametrize("letter", ["x", "é", "日"])
def test_a_name_leaves_room_for_what_is_added_in_bytes(letter: str) -> None:
    longest = 251 // len(letter.encode())
    paths = [letter * longest + ".jpg", letter * (longest - 1) + "z.jpg", "b/" + letter * longest + ".jpg"]
    given = named([*paths, "c/" + letter * (longest - 1) + "z.mp4"])
    assert len({one.base for one in given.values()}) == 4
    for one in given.values():
        name = f"{one.crop(12_345_678, 1234)}.jpeg"
        assert len(name.encode()) <= 255
        assert set(one.base[:50]) == {letter}


def test_a_second_run_keeps_the_names_of_the_first_and_meets_none_of_its_files(tmp_path: Path) -> None:
    first = Register(tmp_path, subjects("x/a.jpg", "scan.jpg"))
    first.write()
    before = {
        path: first.of(one)
        for path, one in zip(("x/a.jpg", "scan.jpg"), subjects("x/a.jpg", "scan.jpg"), strict=True)
    }
    new = ("b/a.png", "scan-2.jpg", "b/scan.jpg")  # b/a.png comes before x/a.jpg
    second = Register(tmp_path, subjects(*new, "x/a.jpg"))
    assert second.of(subjects("x/a.jpg")[0]) == before["x/a.jpg"]
    every = [name for one in (*before.values(), *map(second.of, subjects(*new))) for name in files(one)]
    assert len(every) == len(set(every))
    second.write()
    assert len(json.loads((tmp_path / "outputs.json").read_text())["sources"]) == 5


def test_files_of_no_known_source_are_never_met(tmp_path: Path) -> None:
    for name in ("labels/a.txt", "labels/film_3.txt", "crops/cell/scan-2.jpg", "b.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("kept")
    paths = ("a.jpg", "film.mp4", "scan.jpg", "b.mp4")
    given = Register(tmp_path, subjects(*paths))
    named_now = dict(zip(paths, map(given.of, subjects(*paths)), strict=True))
    assert named_now["a.jpg"].stem(0) != "a"
    assert named_now["film.mp4"].stem(3) != "film_3"
    assert named_now["scan.jpg"].crop(0, 2) != "scan-2"
    assert named_now["b.mp4"].base != "b"


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"sources": 7}', "[" * 100_000, '{"sources": [{"source": "a.jpg"}]}',
        *(
            json.dumps({"sources": [{"source": "a.jpg", "name": name, "film": False, "crop_addition": addition}]})
            for name, addition in (("../../b", ""), ("..", ""), ("", ""), ("a\0", ""), ("a", "/../x"), (7, ""))
        ),
    ],
)  # fmt: skip
def test_a_register_of_somebody_else_leads_nowhere(tmp_path: Path, text: str) -> None:
    (tmp_path / "outputs.json").write_text(text)
    assert Register(tmp_path, subjects("a.jpg")).of(subjects("a.jpg")[0]) == Named(base="a", film=False)


def test_coco_tells_images_apart_that_have_one_number() -> None:
    given = named(["x/1.jpg", "y/1.jpg", "z/001.jpg"])
    assert len(set(image_ids([one.base for one in given.values()]))) == 3


# --- whole commands -------------------------------------------------------------------------------------


def detect(capsys: pytest.CaptureFixture[str], source: Path, *args: str) -> dict[str, object]:
    fixed = [
        "--weights",
        WEIGHTS,
        "--device",
        "cpu",
        "--json",
        "--imgsz",
        "96",
        "--conf-thres",
        "0.05",
        "--max-det",
        "4",
    ]
    assert detect_main([*fixed, "--source", str(source), *args]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def rows_and_crops(run: Path) -> tuple[int, int]:
    rows = sum(len(path.read_text().splitlines()) for path in (run / "labels").glob("*.txt"))
    return rows, len(list((run / "crops").rglob("*.jpg")))


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Return a folder of images and a film whose outputs' names would meet."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for number, name in enumerate(("scan.jpg", "scan-2.jpg", "clip_0.jpg")):
        shutil.copyfile(IMAGES[number], folder / name)
    cv2.imwrite(str(folder / "scan.png"), cv2.imread(str(IMAGES[3])))
    writer = cv2.VideoWriter(str(folder / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 12, (128, 96))
    for number in range(2):
        writer.write(cv2.resize(cv2.imread(str(IMAGES[number])), (128, 96)))
    writer.release()
    return folder


def test_there_are_as_many_rows_and_crops_as_detections_and_the_csv_says_whose_they_are(
    sources: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = detect(capsys, sources, "--save-txt", "--save-crop", "--save-csv")
    run = runs / "detect" / "exp"
    assert rows_and_crops(run) == (told["detections"], told["detections"])
    rows = list(csv.DictReader((run / "predictions.csv").open()))
    for name in {row["file"] for row in rows}:
        of_one = [row for row in rows if row["file"] == name]
        assert len((run / "labels" / f"{name}.txt").read_text().splitlines()) == len(of_one)
        assert len({row["image"] for row in of_one}) == 1
    assert len(told["annotated"]) == 5
    assert all(Path(path).is_file() for path in told["annotated"])  # type: ignore[attr-defined]


def test_a_second_run_into_a_folder_replaces_what_is_of_its_own_sources_and_nothing_else(
    sources: Path, tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--save-txt", "--save-crop", "--save-csv", "--exist-ok")
    first = detect(capsys, sources, *flags)
    again = detect(capsys, sources, *flags, "--max-det", "2")
    run = runs / "detect" / "exp"
    assert 0 < again["detections"] < first["detections"]  # type: ignore[operator]
    assert rows_and_crops(run) == (again["detections"], again["detections"])
    (tmp_path / "other").mkdir()
    shutil.copyfile(IMAGES[5], tmp_path / "other" / "scan.jpg")
    other = detect(capsys, tmp_path / "other", *flags)
    both = again["detections"] + other["detections"]  # type: ignore[operator]
    assert rows_and_crops(run) == (both, both)
    assert len(list(csv.DictReader((run / "predictions.csv").open()))) == both


def test_file_names_that_are_no_text_or_too_long_are_no_trouble(
    tmp_path: Path, runs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = [
        b"bad\xff.jpg",
        b"n" * 251 + b".jpg",
        "é".encode() * 125 + b".png",
        b"new\nline.jpg",
        b'a,b"c.jpg',
    ]
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in names:
        shutil.copyfile(IMAGES[0], os.fsencode(folder) + b"/" + name)
    told = detect(capfd, folder, "--save-txt", "--save-crop", "--save-csv", "--exist-ok")
    run = runs / "detect" / "exp"
    assert rows_and_crops(run) == (told["detections"], told["detections"])
    detect(capfd, folder, "--save-csv", "--exist-ok", "--nosave")
    rows = list(csv.DictReader((run / "predictions.csv").open(errors="surrogateescape", newline="")))
    assert len(rows) == told["detections"]
    assert len({row["image"] for row in rows}) == len(names)


def test_validation_writes_a_label_file_for_each_of_two_images_of_one_name(
    tmp_path: Path, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("starling.training.reporting.plots.draw_validation", lambda *args: None)
    for folder in ("one", "two"):
        (tmp_path / folder / "images").mkdir(parents=True)
        (tmp_path / folder / "labels").mkdir()
        shutil.copyfile(IMAGES[0], tmp_path / folder / "images" / "7.jpg")
        (tmp_path / folder / "labels" / "7.txt").write_text("0 .5 .5 .1 .1\n")
    data = tmp_path / "data.yaml"
    data.write_text(
        "path: .\ntrain: one/images\nval: [one/images, two/images]\nnames: [RBC, WBC, Platelets]\n"
    )
    flags = ["--weights", WEIGHTS, "--data", str(data), "--img", "96", "--device", "cpu"]
    assert val_main([*flags, "--save-txt", "--save-json", "--json"]) == 0, capsys.readouterr().err
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    run = runs / "val" / "exp"
    names = {path.stem for path in (run / "labels").iterdir()}
    assert len(names) == 2
    assert "7" in names
    assert [row["name"] for row in told["renamed"]] == list(names - {"7"})
    rows = json.loads((run / "cells_predictions.json").read_text())
    assert {row["image_id"] for row in rows} == {7, *(names - {"7"})}
