"""Label rows: what is accepted, what is refused, and that a refusal names file and line."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.data.dataset.labels import Keypoints, label_path, parse_labels, read_labels


def test_a_box_row_is_read_as_it_stands() -> None:
    labels = parse_labels("2 0.5 0.25 0.1 0.2\n", 3, "a.txt")
    assert labels.rows.dtype == np.float32
    assert labels.rows.tolist() == [pytest.approx([2, 0.5, 0.25, 0.1, 0.2])]
    assert not labels.problems


def test_a_polygon_becomes_the_box_around_it() -> None:
    labels = parse_labels("0 0.1 0.2 0.5 0.2 0.3 0.6", 1, "a.txt")
    assert labels.rows.tolist() == [pytest.approx([0, 0.3, 0.4, 0.4, 0.4])]


def test_polygons_are_kept_beside_the_rows_they_belong_to() -> None:
    labels = parse_labels(
        "0 .5 .5 .1 .1\n0 .9 .9 .1 .1 .2\n0 .1 .2 .5 .2 .3 .6\n0 .1 .2 .5 .2 .3 .6\n", 1, "a.txt"
    )
    box, polygon = labels.polygons
    assert box is None
    assert polygon is not None
    assert np.allclose(polygon, [[0.1, 0.2], [0.5, 0.2], [0.3, 0.6]])
    assert len(labels.rows) == 2
    assert parse_labels("0 .5 .5 .1 .1\n", 1, "a.txt").polygons == ()


def test_byte_order_mark_and_crlf_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf0 .5 .5 .1 .1\r\n1 .2 .2 .1 .1\r\n\r\n")
    labels = read_labels(path, 2)
    assert len(labels.rows) == 2
    assert not labels.problems


@pytest.mark.parametrize("text", ["0 .5 .5 .1 .1\r1 .2 .2 .1 .1\r", "0 .5 .5 .1 .1\r\n\r1 .2 .2 .1 .1\n"])
def test_a_lone_carriage_return_ends_a_line(text: str) -> None:
    labels = parse_labels(text, 2, "a.txt")
    assert labels.rows[:, 0].tolist() == [0, 1]
    assert not labels.problems
    assert [fault.line for fault in parse_labels("\r\r\n\n0 .5\r", 1, "a.txt").problems] == [4]


@pytest.mark.parametrize(
    ("shape", "points"), [((5, 2), ".27 .36 .33 .36 .3 .4 .27 .44 .33 .44"), ((2, 2), ".3 .4 .31 .42"),
                          ((2, 3), ".3 .4 2 0 0 0"), ((1, 3), "1.4 .4 1")]
)  # fmt: skip
def test_declared_keypoints_leave_the_box_in_columns_2_to_5(shape: tuple[int, int], points: str) -> None:
    labels = parse_labels(f"0 .3 .4 .1 .12 {points}\n0 .5 .5 .1 .1\n", 1, "a.txt", Keypoints(*shape))
    assert not labels.problems
    assert labels.polygons == ()
    assert labels.rows.tolist() == [
        pytest.approx([0, 0.3, 0.4, 0.1, 0.12]),
        pytest.approx([0, 0.5, 0.5, 0.1, 0.1]),
    ]


@pytest.mark.parametrize("row", ["0 .1 .2 .5 .2 .3 .6", "0 .3 .4 .1 .12 .3 .4 2 .3 .4", "0 .3 .4 .1"])
def test_another_number_of_columns_than_the_declared_keypoints_have_is_named_by_file_and_line(
    row: str,
) -> None:
    (fault,) = parse_labels(f"0 .5 .5 .1 .1\n{row}\n", 1, "7.txt", Keypoints(2, 3)).problems
    assert str(fault).startswith(f"7.txt:2: {len(row.split())} columns; with kpt_shape [2, 3] a row has 11")


@pytest.mark.parametrize("boxes", range(2, 8))
def test_several_boxes_on_one_line_are_refused_whatever_their_number(boxes: int) -> None:
    line = " ".join(f"{number % 3} .{number + 1} .5 .1 .1" for number in range(boxes))
    (fault,) = parse_labels(f"\n{line}\n", 3, "7.txt").problems
    assert str(fault).startswith(f"7.txt:2: {boxes} boxes on one line")


@pytest.mark.parametrize(
    "row",
    [
        "0 0 0 .5 0 1 0 1 .5 1 1 0 1 0 .5",
        "1 .05 .1 .8 .1 1 .2 .9 .8 .5 0 .2 .8 .1 .6",
        "0 " + "0 0 1 0 1 1 0 1 " * 3,
    ],
)
def test_a_polygon_with_0_or_1_in_every_fifth_column_stays_one_where_the_rest_is_no_boxes(row: str) -> None:
    labels = parse_labels(f"{row}\n", 2, "a.txt")
    assert not labels.problems
    assert labels.polygons[0] is not None


def test_nine_columns_are_a_quadrilateral_and_fifteen_without_classes_a_polygon() -> None:
    quadrilateral = parse_labels("0 .5 .1 .9 .5 .5 .9 .1 .5\n", 1, "a.txt")
    assert not quadrilateral.problems
    assert quadrilateral.rows.tolist() == [pytest.approx([0, 0.5, 0.5, 0.8, 0.8])]
    polygon = parse_labels("1 .1 .1 .3 .1 .5 .2 .5 .4 .4 .5 .2 .5 .1 .3\n", 2, "a.txt")
    assert polygon.polygons[0] is not None
    assert len(polygon.polygons[0]) == 7


@pytest.mark.parametrize(
    ("row", "count"),
    [
        ("0 .3 .4 .1 .12 .3 .4 2", 1),
        ("0 .3 .4 .1 .12 .3 .4 1 .28 .42 0", 2),
        ("0 .3 .4 .1 .12 .3 .4 2 0 0 0", 2),
        ("0 .5 .5 .4 .4 " + "0 0 0 " * 3 + ".5 .5 1", 4),
        ("0 .5 .5 .4 .4 " + ".6 .6 2 " * 17, 17),
    ],
)
def test_keypoints_that_the_dataset_does_not_declare_are_refused_by_file_and_line(
    row: str, count: int
) -> None:
    (fault,) = parse_labels(f"{row}\n", 1, "7.txt").problems
    assert f"7.txt:1: {5 + 3 * count} columns that read as a box and {count} keypoints" in str(fault)
    assert f"kpt_shape: [{count}, 3]" in fault.remedy


def test_a_polygon_along_the_edges_of_its_image_stays_a_polygon() -> None:
    labels = parse_labels("0 .7 0 1 0 1 .4 1 1 .6 1\n", 1, "a.txt")
    assert not labels.problems
    assert labels.polygons[0] is not None


@pytest.mark.parametrize(
    ("row", "box"),
    [
        ("0 1.01 .5 .1 .1", [0, 1, 0.5, 0.1, 0.1]),
        ("0 .5 -.01 .1 1.004", [0, 0.5, 0, 0.1, 1]),
        ("0 -.005 .2 .5 .2 .3 1.001", [0, 0.25, 0.6, 0.5, 0.8]),
    ],
)
def test_a_value_up_to_a_hundredth_outside_is_clipped_and_counted(row: str, box: list[float]) -> None:
    labels = parse_labels(f"{row}\n", 1, "7.txt")
    assert not labels.problems
    assert labels.rows.tolist() == [pytest.approx(box)]
    assert labels.clipped == 1
    assert "outside [0,1], clipped" in str(labels.notes[0])
    for polygon in labels.polygons:
        assert polygon is not None
        assert polygon.min() >= 0
        assert polygon.max() <= 1


def test_a_value_further_outside_is_a_fault_and_a_box_may_reach_over_the_edge() -> None:
    assert parse_labels("0 1.0101 .5 .1 .1\n", 1, "a.txt").problems
    assert parse_labels("0 .1 .2 .5 .2 .3 -.011\n", 1, "a.txt").problems
    labels = parse_labels("0 .95 .5 .4 .1\n", 1, "a.txt")
    assert not labels.problems
    assert not labels.notes


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("0 nan .5 .1 .1", "x=nan outside [0,1]"),
        ("0 .5 inf .1 .1", "y=inf outside [0,1]"),
        ("0 .5 -0.1 .1 .1", "y=-0.1 outside [0,1]"),
        ("0 1.42 .5 .1 .1", "x=1.42 outside [0,1]"),
        ("0 .5 .5 .1 .1 .9", "6 columns"),
        ("0 .5 .5", "3 columns"),
        ("3 .5 .5 .1 .1", "class 3 but the dataset has 3 (0 to 2)"),
        ("-1 .5 .5 .1 .1", "class -1 is not a whole number"),
        ("inf .5 .5 .1 .1", "class inf is not a whole number"),
        ("nan .5 .5 .1 .1", "class nan is not a whole number"),
        ("cat .5 .5 .1 .1", "'cat' is not a number"),
    ],
)
def test_a_faulty_row_is_named_by_file_and_line(row: str, said: str) -> None:
    labels = parse_labels(f"0 .5 .5 .1 .1\n{row}\n", 3, "train/7.txt")
    assert len(labels.problems) == 1
    assert str(labels.problems[0]).startswith("train/7.txt:2: ")
    assert said in str(labels.problems[0])


def test_repeated_and_sizeless_rows_are_left_out_with_a_note() -> None:
    labels = parse_labels("0 .5 .5 .1 .1\n0 .5 .5 .1 .1\n0 .5 .5 0 .1\n", 1, "a.txt")
    assert len(labels.rows) == 1
    assert not labels.problems
    assert [note.line for note in labels.notes] == [2, 3]


def test_missing_and_empty_files_mean_background(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    for name in ("empty.txt", "missing.txt"):
        labels = read_labels(tmp_path / name, 1)
        assert labels.rows.shape == (0, 5)
        assert not labels.problems


def test_binary_and_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe0\x00")
    assert "not UTF-8" in str(read_labels(tmp_path / "a.txt", 1).problems[0])
    (tmp_path / "folder.txt").mkdir()
    assert "cannot be read" in str(read_labels(tmp_path / "folder.txt", 1).problems[0])


def test_a_flood_of_faults_is_counted_not_listed() -> None:
    started = time.monotonic()
    labels = parse_labels("0 2 2 2 2\n" * 100_000, 1, "a.txt")
    assert len(labels.problems) == 1001
    assert "99000 more" in labels.problems[-1].problem
    assert time.monotonic() - started < 5


def test_only_the_last_images_folder_is_replaced() -> None:
    assert label_path(Path("/images/set/images/train/a.b.jpg")) == Path("/images/set/labels/train/a.b.txt")
    assert label_path(Path("/set/photos/a.jpg")) == Path("/set/photos/a.txt")
    assert label_path(Path("/set/images.jpg")) == Path("/set/images.txt")


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=200), st.text(alphabet="0123456789.eE-+ \n\rnaif", max_size=200)))
def test_no_text_whatever_raises_or_yields_a_value_outside_the_frame(text: str) -> None:
    for keypoints in (None, Keypoints(1, 2)):
        rows = parse_labels(text, 5, "a.txt", keypoints).rows
        assert rows.shape[1] == 5
        assert ((rows[:, 1:] >= 0) & (rows[:, 1:] <= 1)).all()
        assert ((rows[:, 0] >= 0) & (rows[:, 0] < 5)).all()
