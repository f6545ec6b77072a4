"""What both packages read, name and hide is read, named and hidden alike: a file that one takes, the other takes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

import launcher.errors
import starling.core.errors
import starling.errors
from launcher.engines.labels import labels
from launcher.options.training_args import prepare_args
from launcher.options.training_files import read_dataset
from launcher.plan.dry_run import docker_run, podman_run
from starling.config.shipped import find_config
from starling.config.yaml_reader import read_yaml
from starling.core.cgroups import CGroup, groups_of
from starling.core.errors import Exit, StarlingError
from starling.core.plain_yaml import MOST_BYTES
from starling.core.process import all_stats, stat_of
from starling.core.redaction import masked, without_credentials
from starling.data.dataset.dataset import DatasetDescription
from tests.unit.launcher.plan.test_plan import plan_for

WHOLE = "path: .\ntrain: images\nval: images\nnames: [x]\n"
ODD_DESCRIPTIONS = {
    "an alias": "path: .\ntrain: &a images\nval: *a\nnames: [x]\n",
    "a key twice": WHOLE + "train: images\n",
    "a key twice below": "train: images\nval: images\nnames: {0: x, 0: y}\n",
    "a key that is no text": WHOLE + "1: one\n",
    "a list": "- path: .\n",
    "nothing": "",
    "too much": WHOLE + "#" * MOST_BYTES,
    "no split": "path: .\nnames: [x]\n",
    "a split that is a number": "path: .\ntrain: images\nval: 3\nnames: [x]\n",
    "a split with an empty entry": "path: .\ntrain: images\nval: [images, '']\nnames: [x]\n",
    "a root that is a list": "path: [.]\ntrain: images\nval: images\nnames: [x]\n",
    "a root that is no path": 'path: "a\\0b"\ntrain: images\nval: images\nnames: [x]\n',
}


@pytest.mark.parametrize("what", ODD_DESCRIPTIONS)
def test_a_description_that_every_trainer_refuses_is_refused_before_one_starts(
    tmp_path: Path, what: str
) -> None:
    (tmp_path / "images").mkdir()
    path = tmp_path / "data.yaml"
    path.write_text(ODD_DESCRIPTIONS[what])
    with pytest.raises(StarlingError, match=str(path)) as trainers:
        DatasetDescription.from_yaml(path)
    with pytest.raises(StarlingError, match=str(path)) as launchers:
        read_dataset(path)
    assert len(str(launchers.value).splitlines()) == len(str(trainers.value).splitlines()) == 1
    path.write_text(WHOLE)
    assert read_yaml(path)["names"] == ["x"]
    assert read_dataset(path).splits == (tmp_path / "images",) * 2


LAYOUT = {
    "beside the YAML": ("set", None),
    "in the working folder": ("here", "here"),
    "in the folder of datasets beside the working folder": ("datasets", "here"),
    "by a Windows path": ("here", "here"),
}


@pytest.mark.parametrize("where", LAYOUT)
def test_the_root_that_a_training_finds_from_its_working_folder_is_the_replicas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    folder, start = LAYOUT[where]
    for name in ("set", "here", "datasets", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "set" / "blood").mkdir()  # there, but without the split
    root = tmp_path / folder / "blood"
    (root / "images").mkdir(parents=True)
    path = tmp_path / "set" / "data.yaml"
    written = r".\blood" if "Windows" in where else "blood"
    path.write_text(f"path: {written}\ntrain: images\nval: images\nnames: [x]\n")
    monkeypatch.chdir(tmp_path / "here")
    trained = DatasetDescription.from_yaml(path)
    assert trained.root == root

    args = prepare_args(
        ["--data", "../set/data.yaml"],
        cwd=tmp_path / "here",
        runs=tmp_path / "runs",
        runs_inside="/runs",
        isolated=True,
    )
    assert args.start == (tmp_path / start if start else None)
    assert str(root) in {mount.source for mount in args.mounts}
    assert set(args.reads) == {path, root / "images"}

    monkeypatch.chdir(tmp_path / "runs")  # where a replica starts
    if args.start:
        monkeypatch.setenv("STARLING_START", str(args.start))
    inside = DatasetDescription.from_yaml(path)
    assert (inside.root, inside.splits) == (trained.root, trained.splits)


def test_a_shipped_description_whose_data_lies_in_the_working_folder_is_found_by_local_replicas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"cwd": tmp_path / "here", "runs": tmp_path / "runs", "runs_inside": str(tmp_path / "runs")}
    (tmp_path / "here").mkdir()
    args = prepare_args(["--data", "coco128.yaml"], isolated=False, **words)
    assert args.start is None
    monkeypatch.chdir(tmp_path / "here")
    shipped = find_config("datasets", "coco128.yaml")
    named = read_yaml(shipped)
    (tmp_path / "here" / named["path"] / named["train"]).mkdir(parents=True)
    for given in ("coco128.yaml", "coco128"):
        args = prepare_args(["--data", given], isolated=False, **words)
        assert args.start == tmp_path / "here"
        assert prepare_args(["--data", given], isolated=True, **words).start is None
    root = DatasetDescription.from_yaml(shipped).root
    monkeypatch.chdir("/")
    monkeypatch.setenv("STARLING_START", str(args.start))
    assert DatasetDescription.from_yaml(shipped).root == root


SECRETS = {
    "s3://bucket/set?token=T0P": "s3://bucket/set?token=***",
    "https://T0P@host/x": "https://***@host/x",
    "https://T0P:x-oauth-basic@host/x": "https://***:x-oauth-basic@host/x",
    "https://T0P:@host/x": "https://***:@host/x",
    "--study=postgresql://me:T0P@host/db": "--study=postgresql://me:***@host/db",
    "https://me:T0P@T0P@host/x": "https://me:***@host/x",
    "https://host/x?a=1&X-Amz-Signature=T0P&b=2": "https://host/x?a=1&X-Amz-Signature=***&b=2",
    "https://host/x?sv=1&sig=T0P": "https://host/x?sv=1&sig=***",
}
PLAIN = (
    "postgresql+pg8000://me@host/db",
    "ssh://me@host",
    "https://host/a@b.jpg?page=2",
    "a@b",
    "//x",
    "a://@",
)


@pytest.mark.parametrize("address", SECRETS)
def test_what_the_trainer_hides_the_launcher_hides_and_marks_its_place(tmp_path: Path, address: str) -> None:
    assert "T0P" not in without_credentials(address)
    spec = replace(plan_for(tmp_path, gpus="0").replicas[0], command=("train", address))
    assert spec.public()["command"] == ["train", SECRETS[address]]
    assert "T0P" not in docker_run(spec, 0) + podman_run(spec, 0) + json.dumps(labels(spec, 0))
    assert shlex.quote(SECRETS[address]) in docker_run(spec, 0)


@pytest.mark.parametrize("text", PLAIN)
def test_names_that_are_no_secrets_stay_in_a_plan(text: str) -> None:
    assert masked(text) == text


def test_a_long_line_is_looked_at_once() -> None:
    began = time.process_time()
    for text in ("a" * 10**6 + "//", "//" + "a:" * 10**6, "http://" + "&key" * 10**5, "://x@" * 10**5):
        masked(text)
        without_credentials(text)
    assert time.process_time() - began < 5


def test_an_error_has_one_class_and_one_code_of_the_list() -> None:
    modules = (starling.core.errors, starling.errors, launcher.errors)
    kinds = {
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, StarlingError)
    }
    assert len({kind.__name__ for kind in kinds}) == len(kinds)
    assert {kind.exit_code for kind in kinds} == set(Exit)
    assert json.dumps([*Exit]) == "[1, 2, 3, 4, 5, 6, 7]"
    assert f"{Exit.DISK_FULL}" == "6"


def test_a_process_is_read_whatever_its_name_and_none_where_it_has_gone(tmp_path: Path) -> None:
    own = stat_of(os.getpid())
    assert own is not None
    assert (own.parent, own.session, own.ended) == (os.getppid(), os.getsid(0), False)
    assert own.start == int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    (tmp_path / "7").mkdir()
    for text in ("7 (a) Z 1) S) Z 3 4 5" + " 6" * 20, "7 (a) S 1", "", "7 (a) S x y z" + " 6" * 20):
        (tmp_path / "7" / "stat").write_text(text)
        found = stat_of(7, tmp_path)
        assert (found is not None) == ("Z 3" in text)
        if found:
            assert (found.state, found.parent, found.session, found.ticks) == ("Z", 3, 5, 24)
            assert found.ended
            assert dict(all_stats(tmp_path)) == {7: found}
    assert stat_of(8, tmp_path) is None
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        zombie = stat_of(child.pid)
        assert zombie is not None
        assert zombie.ended
    assert stat_of(child.pid) is None


def test_groups_of_either_version_and_of_both_at_once_are_found_below_their_mounts(tmp_path: Path) -> None:
    text = "4:memory,hugetlb:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/x\n0::/a.slice\n"
    found = {name: list(groups_of(text, name, tmp_path)) for name in ("memory", "cpuacct", "pids")}
    second = CGroup(2, tmp_path, tmp_path / "a.slice", "")
    assert found["memory"] == [
        CGroup(1, tmp_path / "memory", tmp_path / "memory/docker/abc", "memory,hugetlb"),
        second,
    ]
    assert found["cpuacct"] == [
        CGroup(1, tmp_path / "cpuacct", tmp_path / "cpuacct/docker/abc", "cpu,cpuacct"),
        second,
    ]
    assert found["pids"] == [second]
    assert list(groups_of("0::/../../etc\n0::/..\nx\n\n0::relative\n", "memory", tmp_path)) == []
    assert list(groups_of("0::/", "memory", tmp_path)) == [CGroup(2, tmp_path, tmp_path, "")]
