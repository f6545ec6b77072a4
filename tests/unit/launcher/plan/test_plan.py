"""The launcher's decisions: devices, arguments, paths, memory, and what a plan shows. Nothing is started here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.devices.devices import Device, split_cores
from launcher.devices.inventory import Gpu, Machine
from launcher.engines.base import Image, Mount
from launcher.engines.labels import is_ours, labels
from launcher.fleet.inspect import look_at_secrets
from launcher.hosts.files import LOCAL
from launcher.hosts.processes import caller_ids
from launcher.hosts.runs_folder import check_runs, replica_user
from launcher.options.request import (
    RUNS_IN_IMAGE,
    TRAINER_IN_IMAGE,
    Entrypoint,
    Request,
    passed_variables,
)
from launcher.options.training_args import TrainingArgs, prepare_args
from launcher.options.training_files import read_dataset
from launcher.plan.check import check
from launcher.plan.dry_run import describe, docker_run, document
from launcher.plan.facts import Facts
from launcher.plan.plan import Plan, make_plan, replica_name
from launcher.problems import raise_all
from starling.core.errors import CheckpointError, DataError, StarlingError, UsageError
from starling.core.handover import NOBODYS_ID
from starling.core.units import GIB, format_cores, format_size, parse_size

DOCKER = Entrypoint(trainer=TRAINER_IN_IMAGE, runs_inside=RUNS_IN_IMAGE, isolated=True)
MACHINE = Machine(cores=tuple(range(16)), memory_bytes=128 * GIB)
GPUS = tuple(Gpu(n, f"GPU-0000-{n}", "H200", 140 * GIB) for n in range(6))
FACTS = Facts(machine=MACHINE, gpus=GPUS, image=Image(name="starling:latest", id="sha256:abc"))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset whose YAML lies in its root."""
    root = tmp_path / "blood"
    (root / "images").mkdir(parents=True)
    (root / "bccd.yaml").write_text("path: .\ntrain: images\nval: images\nnames: [a]\n")
    return root / "bccd.yaml"


def prepare(words: list[str], tmp_path: Path, isolated: bool = True) -> TrainingArgs:
    return prepare_args(
        words, cwd=tmp_path, runs=tmp_path / "runs", runs_inside=RUNS_IN_IMAGE, isolated=isolated
    )


def request_for(tmp_path: Path, words: list[str] | None = None, **asked: object) -> Request:
    args = prepare(words or ["--project", "blood", "--name", "search", "--evolve", "60"], tmp_path)
    values: dict[str, object] = {"gpus": "1"} if "cpus" not in asked else {}
    values |= {"runs": tmp_path / "runs", "user": "1000:1000", "entrypoint": DOCKER}
    return Request(args=args, **(values | asked))  # type: ignore[arg-type]


def plan_for(tmp_path: Path, words: list[str] | None = None, facts: Facts = FACTS, **asked: object) -> Plan:
    """Return the plan, or raise what `up` would refuse."""
    plan = make_plan(request_for(tmp_path, words, **({"gpus": None} | asked)), facts)
    raise_all(check(plan, facts))
    return plan


def shown(plan: Plan) -> str:
    """Return all that a dry run shows."""
    return "\n".join([*describe(plan, FACTS, ()), json.dumps(document(plan, ()))])


@given(st.integers(1, 64), st.integers(1, 64))
def test_cores_are_shared_out_evenly_and_none_twice(cores: int, replicas: int) -> None:
    if replicas > cores:
        with pytest.raises(UsageError):
            split_cores(range(cores), replicas)
        return
    shares = split_cores(range(cores), replicas)
    assert sorted(core for share in shares for core in share) == list(range(cores))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_cores_are_written_as_docker_reads_them() -> None:
    assert format_cores((0, 1, 2, 3, 6, 8, 9)) == "0-3,6,8-9"


@pytest.mark.parametrize(("text", "size"), [("20g", 20 * GIB), ("1.5GB", GIB * 3 // 2), ("512m", GIB // 2)])
def test_sizes_are_binary_as_dockers(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["20", "lots", "-1g", "1e3g", "0g"])
def test_a_wrong_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--memory"):
        parse_size(text)


def test_a_size_too_small_is_taken_for_one_without_its_unit_only_where_it_has_none() -> None:
    with pytest.raises(UsageError, match=r"--memory 20: below 6m, .*; did you mean 20g\?"):
        parse_size("20")
    with pytest.raises(UsageError, match=r"--shm 1k: below 6m, the least a container can have$"):
        parse_size("1k", "--shm")


def test_sizes_read_back_in_words() -> None:
    assert [format_size(size) for size in (20 * GIB, GIB * 3 // 2, GIB // 2)] == ["20 GB", "1.5 GB", "512 MB"]


def test_the_issues_command_line_makes_five_pinned_replicas(dataset: Path, tmp_path: Path) -> None:
    words = [
        "--data",
        str(dataset),
        "--weights",
        "",
        "--cfg",
        "yolov5n.yaml",
        "--img",
        "320",
        "--epochs",
        "10",
    ]
    words += ["--project", "blood", "--name", "search", "--evolve", "60"]
    plan = plan_for(tmp_path, words, gpus="1-5", memory_bytes=20 * GIB)
    assert plan.fleet == "blood/search"
    assert [spec.name for spec in plan.replicas] == [f"blood-search-gpu{n}" for n in range(1, 6)]
    assert {spec.command for spec in plan.replicas} == {(*TRAINER_IN_IMAGE, *words)}
    assert plan.replicas[0].environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert [(m.target, m.read_only) for m in plan.replicas[0].mounts] == [
        (RUNS_IN_IMAGE, False),
        (str(dataset.parent), True),
    ]


def test_cpu_replicas_get_cores_threads_and_the_device_argument(tmp_path: Path) -> None:
    plan = plan_for(tmp_path, cpus=2)
    assert [spec.cores for spec in plan.replicas] == [tuple(range(8)), tuple(range(8, 16))]
    assert {spec.environment["OMP_NUM_THREADS"] for spec in plan.replicas} == {"8"}
    assert all(spec.command[-2:] == ("--device", "cpu") for spec in plan.replicas)


def test_a_home_path_is_expanded_and_mounted_where_it_is(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    args = prepare(["--data=~/blood/bccd.yaml"], tmp_path)
    assert args.words == (f"--data={dataset}",)
    assert [(m.source, m.target) for m in args.mounts] == [(str(dataset.parent), str(dataset.parent))]


def test_a_root_outside_the_yamls_folder_is_mounted_too(dataset: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "lists"
    elsewhere.mkdir()
    (elsewhere / "d.yaml").write_text("path: ../blood\ntrain: images\nval: images\n")
    args = prepare(["--da", "lists/d.yaml"], tmp_path)
    assert {m.source for m in args.mounts} == {str(elsewhere / "d.yaml"), str(dataset.parent)}
    assert args.words == ("--da", str(elsewhere / "d.yaml"))


def test_files_that_the_trainer_ships_pass_untouched(tmp_path: Path) -> None:
    words = [
        "--cfg",
        "yolov5n.yaml",
        "--hyp",
        "/usr/src/app/data/hyps/hyp.finetune.yaml",
        "--data",
        "bccd.yaml",
        "--space",
        "classic.yaml",
    ]
    args = prepare(words, tmp_path)
    assert args.words == tuple(words)
    assert args.mounts == ()


def test_a_file_of_hooks_is_mounted(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "my_hooks.py").touch()
    args = prepare(["--hooks", "my_hooks.py"], tmp_path)
    assert args.words == ("--hooks", str(tmp_path / "my_hooks.py"))
    assert str(tmp_path / "my_hooks.py") in [mount.source for mount in args.mounts]


def test_a_space_of_ones_own_and_the_layouts_that_it_names_are_mounted(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "wide.yaml").write_text("backbone: []\n")
    (tmp_path / "space.yaml").write_text("cfg: [yolov5n.yaml, wide.yaml, space.txt]\n")
    args = prepare(["--evolve", "2", "--space", "space.yaml"], tmp_path)
    assert args.words[2:] == ("--space", str(tmp_path / "space.yaml"))
    assert {m.source for m in args.mounts} == {str(tmp_path / "space.yaml"), str(tmp_path / "wide.yaml")}


@pytest.mark.parametrize(
    ("words", "error", "code"),
    [
        (["--data", "gone/d.yaml"], DataError, 3),
        (["--weights", "gone.pt"], CheckpointError, 4),
        (["--weight", "gone.pt"], CheckpointError, 4),
        (["--hyp", "gone.yaml"], UsageError, 2),
        (["--cfg", "yolov5q.yaml"], UsageError, 2),
        (["--evolve", "2", "--space", "gone.yaml"], UsageError, 2),
        (["--hooks", "gone.py"], UsageError, 2),
        (["--resume", "gone.pt"], CheckpointError, 4),
        (["--project", "../x"], UsageError, 2),
        (["--project", "/elsewhere"], UsageError, 2),
        (["--name", "../x"], UsageError, 2),
        (["--data"], UsageError, 2),
    ],
)
def test_what_is_not_there_is_found_before_anything_starts(
    words: list[str], error: type[StarlingError], code: int, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words[-2:][0]) as caught:
        prepare(words, tmp_path)
    assert caught.value.exit_code == code


def test_a_resumed_checkpoint_points_into_the_writable_runs(tmp_path: Path) -> None:
    last = tmp_path / "runs/train/exp/weights/last.pt"
    last.parent.mkdir(parents=True)
    last.touch()
    args = prepare(["--resume", "runs/train/exp/weights/last.pt"], tmp_path)
    assert args.words == ("--resume", f"{RUNS_IN_IMAGE}/train/exp/weights/last.pt")
    assert prepare(["--resume", "--exist-ok"], tmp_path).words == ("--resume", "--exist-ok")


def test_runs_prefix_and_bare_project_are_one_fleet(tmp_path: Path) -> None:
    fleets = {
        prepare(["--project", name], tmp_path).fleet
        for name in ("blood", "runs/blood", str(tmp_path / "runs/blood"))
    }
    assert fleets == {"blood/exp"}


@pytest.mark.parametrize(
    "project", ["../out", "a/../../out", "/etc", "runs/..", "link", "link/deeper", "in/link"]
)
def test_a_project_that_leaves_the_runs_folder_is_refused_by_path_and_by_link(
    project: str, tmp_path: Path
) -> None:
    for place in (tmp_path / "runs" / "link", tmp_path / "runs" / "in" / "link"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(tmp_path)
    with pytest.raises(UsageError, match="--project") as caught:
        prepare(["--project", project, "--name", "x"], tmp_path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["../x", "..", "a/b", "link"])
def test_a_name_that_leaves_its_project_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "runs" / "p").mkdir(parents=True)
    (tmp_path / "runs" / "p" / "link").symlink_to("/etc")
    with pytest.raises(UsageError, match=r"outside the runs folder|one folder name"):
        prepare(["--project", "p", "--name", name], tmp_path)


def test_a_checkpoint_to_resume_that_a_link_keeps_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "last.pt").touch()
    (tmp_path / "runs" / "last.pt").symlink_to(tmp_path / "last.pt")
    with pytest.raises(UsageError, match=r"--resume: .* leads through a link"):
        prepare(["--resume", "runs/last.pt"], tmp_path)


def test_links_that_stay_within_and_a_linked_runs_folder_are_fine(tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "disk" / "alias").symlink_to("real")
    (tmp_path / "runs").symlink_to("disk")
    assert prepare(["--project", "alias", "--name", "x"], tmp_path).fleet == "alias/x"


@pytest.mark.parametrize(
    "root",
    [
        "/", "/etc", "/run", "/proc/self", "/var/run", "~", "/usr/src/app", "/usr/lib", "/var/lib/docker", "../../../../etc",
        "/var/run/docker.sock", "/run/podman", "/dev",
    ],
)  # fmt: skip
def test_a_dataset_cannot_show_replicas_the_host(root: str, tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text(f"path: '{root}'\ntrain: .\nval: .\n")
    with pytest.raises(DataError, match=r"more than a dataset|not a folder"):
        read_dataset(tmp_path / "d.yaml")


def test_a_link_to_a_system_folder_is_no_way_round(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    (tmp_path / "d.yaml").write_text("path: link\ntrain: .\nval: .\n")
    with pytest.raises(DataError, match="more than a dataset"):
        read_dataset(tmp_path / "d.yaml")


@pytest.mark.parametrize(
    "text", ["[", "- a", "!!python/object/apply:os.system ['x']", "path: 3", "\x00", "train: gone"]
)
def test_a_broken_dataset_yaml_is_a_data_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text(text)
    with pytest.raises(DataError, match=r"d\.yaml"):
        read_dataset(tmp_path / "d.yaml")


def test_memory_above_the_machines_is_refused_with_figures(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="5 replicas need 150 GB and this machine has 128 GB"):
        plan_for(tmp_path, gpus="1-5", memory_bytes=30 * GIB)


def test_without_memory_replicas_share_most_of_the_machine(tmp_path: Path) -> None:
    total = sum(spec.memory_bytes for spec in plan_for(tmp_path, gpus="all").replicas)
    assert 0.85 * MACHINE.memory_bytes < total <= 0.9 * MACHINE.memory_bytes


@pytest.mark.parametrize("asked", [{"gpus": "0", "cpus": 1}, {"cpus": 17}, {"cpus": 0}, {"gpus": "9"}])
def test_devices_that_cannot_be_had_are_refused(asked: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--(gpus|cpu)"):
        plan_for(tmp_path, **asked)


@pytest.mark.parametrize("words", [["--device", "3"], ["--device=0,1"], ["--dev", "cpu"]])
def test_a_device_argument_that_the_replica_lacks_is_refused(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--device"):
        plan_for(tmp_path, words, gpus="0")


TRAINING = ["--project", "blood", "--name", "first"]


def test_one_training_on_several_gpus_gets_the_sum_of_their_shares(tmp_path: Path) -> None:
    [alone] = plan_for(tmp_path, TRAINING, gpus="2", memory_bytes=8 * GIB).replicas
    [spec] = plan_for(tmp_path, TRAINING, gpus="0-3", ddp=True, memory_bytes=8 * GIB).replicas
    assert (spec.name, spec.device.label) == ("blood-first-gpu0-3", "gpu:0-3")
    assert spec.public()["uuids"] == [f"GPU-0000-{number}" for number in range(4)]
    assert spec.command == (*alone.command, "--device", "0,1,2,3")
    for field in ("memory_bytes", "shm_bytes", "tmp_bytes", "pids_limit"):
        assert getattr(spec, field) == 4 * getattr(alone, field), field
    assert spec.environment["OMP_NUM_THREADS"] == "4", "the machine's 16 cores, shared by four processes"
    assert '"device=GPU-0000-0,GPU-0000-1,GPU-0000-2,GPU-0000-3"' in docker_run(spec, 0)


def test_one_training_on_cpus_gets_all_their_cores(tmp_path: Path) -> None:
    [spec] = plan_for(tmp_path, TRAINING, cpus=2, ddp=True).replicas
    assert (spec.name, spec.device.label) == ("blood-first-cpu0-1", "cpu:0-1")
    assert spec.cores == MACHINE.cores
    assert spec.environment["OMP_NUM_THREADS"] == "8"
    assert spec.command[-2:] == ("--device", "cpu,cpu")
    assert spec.memory_bytes == sum(
        each.memory_bytes for each in plan_for(tmp_path, TRAINING, cpus=2).replicas
    )


def test_one_training_on_one_device_is_what_it_is_without_ddp_and_says_so(tmp_path: Path) -> None:
    together, alone = (plan_for(tmp_path, TRAINING, gpus="2", ddp=ddp) for ddp in (True, False))
    assert together.replicas == alone.replicas
    assert any("one device" in note for note in together.notes)
    assert not any("--ddp" in note for note in alone.notes)
    assert any("--ddp to train one model" in note for note in plan_for(tmp_path, TRAINING, gpus="2-3").notes)


def test_a_search_is_not_one_training(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--ddp: a search trains different candidates on each device"):
        plan_for(tmp_path, gpus="0-3", ddp=True)


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (
            [],
            "--batch-size 16: cannot be split evenly over 3 processes; the nearest that can is --batch-size 15",
        ),
        (["--batch", "64"], "the nearest that can is --batch-size 63"),
        (["--batch-size=1"], "the nearest that can is --batch-size 3"),
        (["--batch-size", "-1"], "give the batch of all 3 processes together"),
    ],
)
def test_a_batch_that_the_devices_cannot_share_is_refused_before_anything_starts(
    tmp_path: Path, words: list[str], remedy: str
) -> None:
    with pytest.raises(UsageError) as caught:
        plan_for(tmp_path, [*TRAINING, *words], gpus="0-2", ddp=True)
    assert remedy in str(caught.value)
    plan_for(tmp_path, [*TRAINING, *words], gpus="0-2")


def test_a_resumed_training_is_split_as_its_checkpoint_says_unless_a_batch_is_given(tmp_path: Path) -> None:
    plan_for(tmp_path, [*TRAINING, "--resume"], gpus="0-2", ddp=True)
    with pytest.raises(UsageError, match="--batch-size 8: cannot be split evenly over 3"):
        plan_for(tmp_path, [*TRAINING, "--resume", "--batch", "8"], gpus="0-2", ddp=True)


def test_slices_are_not_joined(tmp_path: Path) -> None:
    for text in ("2:0,2:1", "MIG-8f6a2b3c,MIG-8f6a2b3d"):
        with pytest.raises(UsageError, match="one MIG slice and no more"):
            plan_for(tmp_path, TRAINING, replace(FACTS, gpus=None), gpus=text, ddp=True)


def test_the_replicas_own_devices_may_be_said_and_no_others(tmp_path: Path) -> None:
    [spec] = plan_for(tmp_path, [*TRAINING, "--device", "0,1"], gpus="2-3", ddp=True).replicas
    assert spec.command[-2:] == ("--device", "0,1")
    for asked in ("2,3", "0", "cpu,cpu"):
        with pytest.raises(
            UsageError, match=f"--device {asked}: each replica finds its own devices automatically"
        ):
            plan_for(tmp_path, [*TRAINING, "--device", asked], gpus="2-3", ddp=True)
    with pytest.raises(UsageError, match="and --ddp for one training on several"):
        plan_for(tmp_path, [*TRAINING, "--device", "0,1"], gpus="2-3")


def test_a_process_of_the_local_engine_is_pinned_by_uuid(tmp_path: Path) -> None:
    local = Entrypoint(trainer=("python", "t.py"), runs_inside=str(tmp_path), isolated=False)
    [spec] = plan_for(tmp_path, TRAINING, gpus="1-2", ddp=True, entrypoint=local).replicas
    assert spec.environment["CUDA_VISIBLE_DEVICES"] == "GPU-0000-1,GPU-0000-2"


def test_secrets_show_by_name_only(tmp_path: Path) -> None:
    words = ["--data", "https://u:hunter2@db/data.yaml"]
    plan = plan_for(tmp_path, words, gpus="1", passed={"CLEARML_API_SECRET_KEY": "s3cret"})
    [spec] = plan.replicas
    assert "s3cret" not in shown(plan) + repr(plan) + json.dumps(labels(spec, 0))
    assert "--env CLEARML_API_SECRET_KEY" in shown(plan)
    assert "hunter2" not in shown(plan) + json.dumps(labels(spec, 0))
    assert words[1] in spec.command


def test_trackers_variables_pass_by_themselves_and_others_when_named() -> None:
    trackers = {"MLFLOW_RUN": "r", "CLEARML_X": "c", "MLFLOW_TRACKING_USERNAME": "u"}
    mine = {**trackers, "MLFLOW_OTHER": "no", "TOKEN": "t"}
    assert passed_variables(mine) == trackers
    assert passed_variables(mine, ["TOKEN"])["TOKEN"] == "t"
    for wrong in ("GONE", "A=b"):
        with pytest.raises(UsageError, match="--env"):
            passed_variables(mine, [wrong])


@pytest.mark.parametrize(
    "words",
    [
        ["--study", "postgresql://u:hunter2@db/study"],
        ["--stu=postgres://u:hunter2@db/study"],
        ["--study", "postgresql://u@db/study?password=hunter2"],
    ],
)
def test_a_study_with_a_password_is_refused_before_it_is_a_containers_command(
    words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="STARLING_STUDY_PASSWORD_FILE") as caught:
        prepare(["--evolve", "2", *words], tmp_path)
    assert "hunter2" not in str(caught.value)
    assert prepare(["--evolve", "2", "--study", "postgresql://u@db:5432/study"], tmp_path)


@pytest.mark.parametrize("words", [["--remote", "gpus"], ["--rem=gpus"]])
def test_a_training_for_a_queue_is_not_queued_once_a_replica(words: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"--remote gpus: .*each replica .*: python train\.py … --remote gpus"
    ):
        prepare([*TRAINING, *words], tmp_path)
    assert prepare([*TRAINING, "--remote", ""], tmp_path).words[-1] == "", "as the trainer takes it: here"


def plan_with_secrets(tmp_path: Path, passed: Mapping[str, str]) -> Plan:
    """Return the plan for variables that name files, which are looked for as `up` looks for them."""
    request = request_for(tmp_path, passed=passed)
    facts = replace(FACTS, secrets=tuple(look_at_secrets(request, LOCAL, judged=False)))
    return plan_for(tmp_path, facts=facts, gpus="1", passed=passed)


@pytest.mark.parametrize("variable", ["STARLING_STUDY_PASSWORD_FILE", "MLFLOW_TRACKING_PASSWORD_FILE"])
def test_the_file_of_a_servers_password_is_mounted_and_never_read(variable: str, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("hunter2")
    [spec] = plan_with_secrets(tmp_path, passed_variables({variable: str(secret)})).replicas
    assert spec.mounts[1:] == (Mount(source=str(secret), target=str(secret), read_only=True),)
    assert spec.passed[variable] == str(secret)
    for wrong in ("password", str(tmp_path / "none")):
        with pytest.raises(UsageError, match=f"{variable}=.*absolute path of a file"):
            plan_with_secrets(tmp_path, {variable: wrong})


@pytest.mark.parametrize("given", ["{home}/clearml.conf", "~/clearml.conf", "clearml.conf"])
def test_clearmls_file_is_mounted_and_its_variable_leads_there(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "clearml.conf"
    secret.write_text("api.credentials.secret_key = hunter2")
    passed = passed_variables({"CLEARML_CONFIG_FILE": given.format(home=tmp_path)})
    plan = plan_with_secrets(tmp_path, passed)
    [spec] = plan.replicas
    assert Mount(source=str(secret), target=str(secret), read_only=True) in spec.mounts
    assert spec.environment["CLEARML_CONFIG_FILE"] == str(secret)
    assert "CLEARML_CONFIG_FILE" not in spec.passed
    assert "hunter2" not in "\n".join([shown(plan), *labels(spec, 0).values()])


def test_clearmls_file_that_is_not_there_is_noted_and_stops_nothing(tmp_path: Path) -> None:
    for wrong in (tmp_path, tmp_path / "gone"):
        passed = {"CLEARML_CONFIG_FILE": str(wrong)}
        plan = plan_with_secrets(tmp_path, passed)
        [spec] = plan.replicas
        assert (len(spec.mounts), spec.passed) == (1, passed)
        [note] = plan.notes
        assert note.startswith(f"CLEARML_CONFIG_FILE={wrong}: no such file")


def test_a_volume_of_the_servers_and_their_address_are_part_of_the_plan(tmp_path: Path) -> None:
    volume = Mount(kind="volume", source="starling_trainer", target="/run/starling-trainer")
    asked = {"volumes": (volume,), "settings": {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}}
    [plain] = plan_for(tmp_path, gpus="1").replicas
    [spec] = plan_for(tmp_path, gpus="1", **asked).replicas
    assert spec.digest != plain.digest
    assert "type=volume,source=starling_trainer,target=/run/starling-trainer,readonly" in docker_run(spec, 1)
    assert "MLFLOW_TRACKING_URI=http://mlflow:5000" in docker_run(spec, 1)
    # A path's mount is labelled as it was before volumes were: a running fleet of an older launcher has not changed.
    assert all(set(mount) == {"source", "target", "read_only"} for mount in plain.public()["mounts"])


def test_the_docker_run_line_carries_every_limit(tmp_path: Path) -> None:
    line = docker_run(plan_for(tmp_path, gpus="1", memory_bytes=20 * GIB).replicas[0], 0)
    for part in (
        f"--memory {20 * GIB} --memory-swap {20 * GIB}",
        "--cap-drop ALL --security-opt no-new-privileges:true --read-only",
        "--init",
        "--pids-limit",
        "device=GPU-0000-1",
        "max-size=10m",
        "--user 1000:1000",
    ):
        assert part in line


def test_equal_requests_have_equal_digests_and_a_rebuilt_image_another(tmp_path: Path) -> None:
    first, again = (plan_for(tmp_path, gpus="1").replicas[0] for _ in range(2))
    assert first.digest == again.digest
    assert replace(first, image_id="sha256:def").digest != first.digest


def test_only_the_exact_labels_make_a_container_ours(tmp_path: Path) -> None:
    spec = plan_for(tmp_path, gpus="1").replicas[0]
    exact = labels(spec, 7)
    assert is_ours(exact, spec.name, 7)
    assert not is_ours(exact, spec.name, 8)
    assert not is_ours(exact, "copy", 7)
    for missing in exact:
        assert not is_ours({k: v for k, v in exact.items() if k != missing}, spec.name, 7)
        assert not is_ours({**exact, missing: exact[missing] + "x"}, spec.name, 7)


def test_names_hold_only_the_letters_that_docker_takes() -> None:
    assert replica_name("my project/früh/exp 2", Device("gpu", "3")) == "my-project-fr-h-exp-2-gpu3"
    assert replica_name("a/b", Device("gpu", "GPU-8f6a2b3c-1111")) == "a-b-gpu-8f6a2b3c1111"


def test_replicas_run_as_the_caller_and_never_as_a_stranger(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert replica_user(runs, (1000, 100), None) == "1000:100"
    assert replica_user(runs, (0, 0), None) == f"{NOBODYS_ID}:{NOBODYS_ID}"
    assert replica_user(runs, (0, 0), "5:6") == "5:6"
    (runs / "train").mkdir(parents=True)
    owner = runs.stat()
    expected = NOBODYS_ID if owner.st_uid == 0 else owner.st_uid
    assert replica_user(runs, (0, 0), None).split(":")[0] == str(expected)
    assert replica_user(runs, (1000, 0), None) == "1000:1000"
    for wrong in ("me", "1", "1:x", ":", "1:2:3", "+1:2", "1 :2", "٣:٣", "-1:5", "9" * 5000 + ":5"):
        with pytest.raises(UsageError, match="must be numbers"):
            replica_user(runs, (0, 0), wrong)


@pytest.mark.parametrize(
    "user", ["0:0", "0:5", "00:5", "000:005", "5:0", "5:00", "4294967296:5", "4294967295:5", "5:2147483648"]
)
def test_root_is_refused_as_a_replicas_user_in_every_spelling(user: str, tmp_path: Path) -> None:
    for caller in ((0, 0), (1000, 100)):
        with pytest.raises(UsageError, match="never run as root or in root's group"):
            replica_user(tmp_path, caller, user)
    with pytest.raises(UsageError, match="never run as root or in root's group"):
        plan_for(tmp_path, gpus="1", user=user)


def test_behind_sudo_the_caller_is_who_typed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getuid", lambda: 0)
    assert caller_ids({"SUDO_UID": "1000", "SUDO_GID": "100"}) == (1000, 100)
    monkeypatch.setattr("os.getuid", lambda: 5)
    assert caller_ids({"SUDO_UID": "1000", "SUDO_GID": "100"})[0] == 5


@pytest.mark.parametrize(
    "runs", ["/", "/home", "/etc", "/etc/cron.d", "/usr/lib", "/dev/null/x", "/run/x", "link", "link/deeper"]
)
def test_runs_must_be_a_folder_of_its_own(runs: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(UsageError, match="--runs"):
        check_runs(tmp_path / runs)


def test_a_dataset_may_lie_in_the_runs_folder_and_is_shown_read_only_there(tmp_path: Path) -> None:
    (tmp_path / "runs" / "made").mkdir(parents=True)
    (tmp_path / "runs" / "d.yaml").write_text("path: .\ntrain: made\nval: made\nnames: [a]\n")
    [mount] = prepare(["--data", "runs/d.yaml"], tmp_path).mounts
    assert (mount.source, mount.read_only) == (str(tmp_path / "runs"), True)


@pytest.mark.parametrize("given", ["yolov5s", "yolov5s.pt"])
def test_published_weights_are_mounted_from_the_hosts_cache_and_asked_for_when_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("STARLING_WEIGHTS", str(tmp_path / "kept"))
    with pytest.raises(CheckpointError, match=r"starling data download yolov5s\.pt"):
        prepare(["--weights", given], tmp_path)
    kept = tmp_path / "kept" / "yolov5s.pt"
    kept.parent.mkdir()
    kept.touch()
    args = prepare(["--weights", given], tmp_path)
    assert args.words == ("--weights", str(kept))
    assert [mount.source for mount in args.mounts] == [str(kept)]
