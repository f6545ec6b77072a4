"""The client of ClearML's API, and tasks as command lines; over a double of ClearML's server."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from starling.config.hyp import Hyp
from starling.config.yaml_reader import read_yaml
from starling.core.errors import ConfigError, UsageError
from starling.core.settings.train import TrainConfig, parse_args
from starling.tracking.clearml.client import script
from starling.tracking.clearml.client.api import ClearmlApi, ClearmlRefusedError, ClearmlUnavailableError
from starling.tracking.clearml.client.credentials import find_credentials, is_configured
from starling.tracking.clearml.client.tasks import (
    command_line,
    create_task,
    get_task,
    hyper_params,
    project_id,
    project_name,
    sections_of,
)
from starling.tracking.clearml.tracker import ClearmlTracker
from starling.tracking.tracker import Run
from tests.doubles.clearml_server import ACCESS_KEY, SECRET_KEY, Answer, ClearmlServerDouble


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ClearmlServerDouble]:
    with ClearmlServerDouble(tmp_path / "double") as running:
        yield running


def api_of(server: ClearmlServerDouble, **changes: Any) -> ClearmlApi:
    credentials = find_credentials({**server.environment, "HOME": "/nowhere"})
    assert credentials is not None
    return ClearmlApi(credentials, **changes)


# --- credentials ----------------------------------------------------------------------------------------------

CONFIG = """
# ClearML SDK configuration file
api {
    # Notice: 'host' is the api server (default port 8008), not the web server.
    api_server: http://127.0.0.1:8008
    web_server: http://127.0.0.1:8080
    files_server: http://127.0.0.1:8081
    credentials {"access_key": "from-the-file", "secret_key": "s3cret"}
}
sdk { storage { cache { default_base_dir: "~/.clearml/cache" } } }
"""


def test_nothing_set_is_no_configuration(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path)}
    assert not is_configured(environment)
    assert find_credentials(environment) is None
    assert not is_configured({**environment, "CLEARML_API_ACCESS_KEY": "", "CLEARML_API_SECRET_KEY": ""})


def test_the_file_of_clearml_init_is_read_and_variables_come_first(tmp_path: Path) -> None:
    (tmp_path / "clearml.conf").write_text(CONFIG)
    environment = {"HOME": str(tmp_path)}
    assert is_configured(environment)
    found = find_credentials(environment)
    assert found is not None
    assert (found.api_host, found.files_host) == ("http://127.0.0.1:8008", "http://127.0.0.1:8081")
    assert (found.access_key, found.secret_key, found.verify) == ("from-the-file", "s3cret", True)
    mixed = find_credentials(
        {**environment, "CLEARML_API_HOST": "http://other:1/", "CLEARML_API_HOST_VERIFY_CERT": "/ca.pem"}
    )
    assert mixed is not None
    assert (mixed.api_host, mixed.verify) == ("http://other:1", "/ca.pem")
    assert "s3cret" not in repr(found)


def test_keys_alone_mean_the_hosted_service(tmp_path: Path) -> None:
    found = find_credentials(
        {"HOME": str(tmp_path), "CLEARML_API_ACCESS_KEY": "a", "CLEARML_API_SECRET_KEY": "b"}
    )
    assert found is not None
    assert (found.api_host, found.files_host) == ("https://api.clear.ml", "https://files.clear.ml")


def test_where_nothing_reads_the_file_variables_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clearml.conf").write_text(CONFIG)
    monkeypatch.setitem(sys.modules, "clearml.utilities.pyhocon", None)
    keys = {"CLEARML_API_ACCESS_KEY": "a", "CLEARML_API_SECRET_KEY": "b", "CLEARML_API_HOST": "http://there"}
    found = find_credentials({"HOME": str(tmp_path), **keys})
    assert found is not None
    assert found.api_host == "http://there"
    with pytest.raises(UsageError, match="needs the package clearml"):
        find_credentials({"HOME": str(tmp_path)})


def test_a_damaged_file_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "c.conf").write_text("api { credentials {")
    with pytest.raises(UsageError, match="run clearml-init again"):
        find_credentials({"CLEARML_CONFIG_FILE": str(tmp_path / "c.conf")})


# --- calls ----------------------------------------------------------------------------------------------------


def test_a_server_that_is_busy_for_a_while_is_waited_for(server: ClearmlServerDouble) -> None:
    server.faults.answer, server.faults.left = Answer(503), 2
    pauses: list[float] = []
    api = api_of(server, patience_s=10, sleep=pauses.append)
    assert api.call("tasks.get_all")["tasks"] == []
    assert pauses == [0.5, 1.0]


def test_a_refusal_is_not_tried_again(server: ClearmlServerDouble) -> None:
    with pytest.raises(ClearmlRefusedError, match="Invalid task id"):
        api_of(server, patience_s=10).call("tasks.get_by_id", task="0" * 32)
    assert len(server.asked("tasks.get_by_id")) == 1


def test_an_upload_of_any_bytes_and_any_name_arrives_whole(
    server: ClearmlServerDouble, tmp_path: Path
) -> None:
    content = bytes(range(256)) * 700 + b"\r\n--"
    (tmp_path / "best.pt").write_bytes(content)
    url = api_of(server).upload(tmp_path / "best.pt", 'blood/my "run"; é\r\n.1/best.pt')
    assert server.upload(url).read_bytes() == content


def test_an_endless_answer_is_given_up(server: ClearmlServerDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starling.tracking.clearml.client.api.MAX_ANSWER_BYTES", 1000)
    server.faults.answer = Answer(200, b" " * 5_000_000)
    with pytest.raises(ClearmlUnavailableError, match="an answer of over"):
        api_of(server).call("tasks.get_all")


def test_no_error_holds_the_keys(server: ClearmlServerDouble) -> None:
    server.stop()
    with pytest.raises(ClearmlUnavailableError) as caught:
        api_of(server).call("tasks.get_all")
    assert ACCESS_KEY not in str(caught.value)
    assert SECRET_KEY not in str(caught.value)


def test_projects_are_found_by_their_whole_name(server: ClearmlServerDouble) -> None:
    api = api_of(server)
    first = project_id(api, "a.b/c")
    assert project_id(api, "axb/c") != first
    assert project_id(api, "a.b/c") == first
    assert project_name("runs/train") == "train"
    assert project_name("/data/blood//x/") == "data/blood/x"


# --- the double keeps the server's rules ----------------------------------------------------------------------


def test_the_double_orders_pages_and_projects(server: ClearmlServerDouble) -> None:
    answer = server.records.answer
    for name in ("b", "c", "a"):
        answer("tasks.create", {"name": name, "type": "training", "tags": [name]})
    found = answer(
        "tasks.get_all", {"order_by": ["-name"], "page": 1, "page_size": 2, "only_fields": ["name"]}
    )
    assert [set(task) for task in found["tasks"]] == [{"id", "name"}]
    assert [task["name"] for task in found["tasks"]] == ["a"]
    assert [
        task["name"] for task in answer("tasks.get_all", {"tags": ["-b"], "order_by": ["created"]})["tasks"]
    ] == ["c", "a"]


def test_the_double_refuses_what_the_server_refuses(server: ClearmlServerDouble) -> None:
    api = api_of(server)
    task = str(api.call("tasks.create", name="t", type="training")["id"])
    api.call("tasks.started", task=task)
    with pytest.raises(ClearmlRefusedError, match="Invalid task status"):
        api.call("tasks.edit", task=task, name="other")
    api.call("tasks.completed", task=task)
    with pytest.raises(ClearmlRefusedError, match="Invalid task status"):
        api.call("tasks.started", task=task)
    with pytest.raises(ClearmlRefusedError, match="Invalid queue id"):
        api.call("tasks.enqueue", task=task, queue="nowhere")
    with pytest.raises(ClearmlRefusedError, match="does not know"):
        api.call("tasks.invented")
    assert server.unknown == {"tasks.invented"}


# --- tasks as command lines -----------------------------------------------------------------------------------

OTHER: dict[str, Any] = {
    "weights": "", "cfg": "yolov5n.yaml", "data": "clearml://" + "a" * 32, "epochs": 7, "batch_size": -1, "freeze": (0, 2),
    "optimizer": "AdamW", "cos_lr": True, "label_smoothing": 0.1, "save_minutes": 0.5, "name": "my name", "project": "a/b",
    "seed": 3, "device": "cpu", "cache": "off", "rect": True, "patience": 0, "bucket": "file://out",
}  # fmt: skip


def stored(api: ClearmlApi, config: TrainConfig, hyp: Hyp) -> dict[str, Any]:
    """Return the task that holds a training, as the server gives it back."""
    params = {**config.as_dict(), **{f"hyp/{name}": value for name, value in hyp.as_dict().items()}}
    return get_task(api, create_task(api, name="t", project="p", params=params))


def test_a_task_gives_back_the_command_that_it_was_made_of(
    server: ClearmlServerDouble, tmp_path: Path
) -> None:
    api = api_of(server)
    config = TrainConfig(**OTHER)
    hyp = Hyp(lr0=0.0123, mosaic=0.5)
    words = command_line(stored(api, config, hyp), tmp_path)
    read = parse_args(words).config
    assert replace(read, hyp=config.hyp) == config
    assert Hyp.from_mapping(read_yaml(Path(read.hyp))) == hyp
    every = {name: value for name, value in config.as_dict().items() if name in OTHER}
    assert {f"--{name.replace('_', '-')}" for name in every} <= {word.partition("=")[0] for word in words}


def test_defaults_are_left_out_and_so_is_what_concerns_this_machine_only(
    server: ClearmlServerDouble, tmp_path: Path
) -> None:
    words = command_line(
        stored(api_of(server), TrainConfig(remote="q", json=True, debug=True), Hyp()), tmp_path
    )
    assert words == ["--hyp", str(tmp_path / "hyp.yaml")]
    known = {field.name for field in fields(TrainConfig)}
    assert set(sections_of(TrainConfig().as_dict())["Args"]) == known - {
        "remote",
        "json",
        "debug",
        "local_rank",
    }


@pytest.mark.parametrize(
    ("section", "name", "value", "said"),
    [
        ("Args", "epoch", "3", "did you mean 'epochs'"),
        ("Args", "epochs", "many", "must be a number"),
        ("Args", "rect", "perhaps", "True or False"),
        ("Args", "freeze", "[a]", "list of numbers"),
        ("Hyp", "lr0", "fast", "must be a number"),
        ("Hyp", "lr", "0.1", "did you mean"),
        ("Hyp", "lr0", "-1", "0 or above"),
    ],
)
def test_what_the_page_was_given_wrongly_is_named(
    tmp_path: Path, section: str, name: str, value: str, said: str
) -> None:
    task = {"id": "t", "hyperparams": hyper_params(section, {name: value})}
    with pytest.raises((ConfigError, UsageError), match=said):
        command_line(task, tmp_path)


# --- the code -------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a checkout with a commit and a change on top, from which the code seems to run."""
    folder = tmp_path / "checkout"
    (folder / "app").mkdir(parents=True)
    (folder / "app" / "train.py").write_text("one\n")
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    for words in (["init", "-q", "-b", "trunk"], ["add", "."], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    (folder / "app" / "train.py").write_text("two\n")
    monkeypatch.setattr(script, "ROOT", folder)
    return folder


def test_a_checkout_with_a_remote_is_named_with_commit_and_diff_but_no_password(checkout: Path) -> None:
    url = "https://me:secret@example.org/starling.git"
    subprocess.run(["git", "-C", str(checkout), "remote", "add", "origin", url], check=True)
    found = script.describe_script()
    assert found["repository"] == "https://example.org/starling.git"
    assert (found["branch"], found["entry_point"], len(found["version_num"])) == ("trunk", "app/train.py", 40)
    assert "-one\n+two" in found["diff"]
    assert "numpy == " in found["requirements"]["pip"]


@pytest.mark.parametrize(
    ("remote", "shown"),
    [
        ("ssh://git:secret@example.org/s.git", "ssh://git@example.org/s.git"),
        ("git@example.org:s.git", "git@example.org:s.git"),
        ("/srv/s.git", ""),
    ],
)
def test_no_remote_of_whatever_kind_shows_its_password(checkout: Path, remote: str, shown: str) -> None:
    subprocess.run(["git", "-C", str(checkout), "remote", "add", "origin", remote], check=True)
    assert script.describe_script()["repository"] == shown


def test_a_secret_of_the_environment_is_not_in_the_diff(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(
        ["git", "-C", str(checkout), "remote", "add", "origin", "https://example.org/s.git"], check=True
    )
    monkeypatch.setenv("REGISTRY_PASSWORD", "hunter2-and-more")
    (checkout / "app" / "train.py").write_text('login("hunter2-and-more")\n')
    assert '+login("***")' in script.describe_script()["diff"]


def test_a_run_that_is_imported_later_shows_the_code_and_the_machine_of_its_training(
    checkout: Path, server: ClearmlServerDouble, tmp_path: Path
) -> None:
    subprocess.run(
        ["git", "-C", str(checkout), "remote", "add", "origin", "https://example.org/s.git"], check=True
    )
    tracker = ClearmlTracker(tmp_path, {**server.environment, "HOME": str(tmp_path)})

    def task_of(uuid: str, **tags: str) -> dict[str, Any]:
        folder = tmp_path / uuid
        folder.mkdir()
        (folder / "uncommitted.diff").write_text("diff of then\n")
        run = Run(uuid=uuid, name=uuid, project="p", time=1e9, params={}, tags=tags, directory=folder)
        return server.records.tasks[tracker.start_run(run)]

    then = task_of("u1", git_commit="a" * 40, git_dirty="True", host="elsewhere")
    assert (then["script"]["version_num"], then["script"]["diff"]) == ("a" * 40, "diff of then\n")
    assert then["script"]["repository"] == "https://example.org/s.git"
    assert then["runtime"] == {"hostname": "elsewhere"}
    clean = task_of("u2", git_commit="a" * 40, git_dirty="False", host=platform.node())
    assert clean["script"]["diff"] == ""
    assert "cpu_cores" in clean["runtime"]


def test_code_that_no_agent_could_clone_is_the_package_of_the_agents_image(checkout: Path) -> None:
    found = script.describe_script()
    assert (found["repository"], found["entry_point"]) == ("", "train.py")
    compile(found["diff"], "train.py", "exec")
    assert "from starling.cli.train import main" in found["diff"]
