"""Settings from starling.yaml: who wins, what is refused and where, and that every flag of `up` can be said."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from launcher.cli.init import example
from launcher.cli.main import cli
from launcher.cli.up import up
from launcher.engines.opening import find_host
from launcher.errors import EngineError
from launcher.options.config_file import keys_of
from launcher.options.training_words import without_overridden
from starling.core.errors import UsageError
from tests.conftest import PYTHON_PATH

UP = up


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in an empty folder with a plain environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("STARLING_RUNS", "STARLING_ENGINE", "DOCKER_HOST", "DOCKER_CONTEXT"):
        monkeypatch.setenv(
            name, ""
        )  # noted down even where it is unset: `--host` sets a variable of this process
        monkeypatch.delenv(name)
    return tmp_path


def parsed(*words: str) -> dict[str, Any]:
    """Return what a command's function would be called with."""
    root = cli.make_context("launcher", list(words))
    command = cli.get_command(root, root._protected_args[0])
    assert command is not None
    with root:
        return command.make_context(command.name, list(root.args), parent=root).params


def write(text: str, path: str = "starling.yaml") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def test_flags_win_over_variables_over_the_file_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(parsed("up")["runs"]) == "runs"
    write("runs: from-file\nengine: local\nmemory: 20g\n")
    values = parsed("up")
    assert (str(values["runs"]), values["engine"], values["memory"]) == (
        f"{Path.cwd()}/from-file",
        "local",
        "20g",
    )
    monkeypatch.setenv("STARLING_RUNS", "from-variable")
    assert str(parsed("up")["runs"]) == "from-variable"
    assert str(parsed("up", "--runs", "from-flag", "--memory", "1g")["runs"]) == "from-flag"
    assert parsed("up", "--memory", "1g")["memory"] == "1g"


def test_every_flag_of_up_can_be_said_in_the_file() -> None:
    flags = {
        name[2:]
        for param in UP.params
        for name in param.opts
        if isinstance(param, click.Option) and name.startswith("--") and param.name != "file"
    }
    keys = keys_of(UP)
    assert flags == set(keys)
    assert {"engine", "runs", "host", "gpus", "cpu", "env-file"} <= flags
    for key, option in keys.items():
        write(f"{key}: {'true' if option.is_bool_flag else example(key, option)}\n")
        values = parsed("up")
        if option.expose_value:
            value = values[option.name or ""]
            assert value is not None, key
            assert value is not False, key
            assert value != (), key


def test_each_key_says_what_its_flag_says() -> None:
    write(
        "gpus: [0, 2-4]\nmemory: 20g\nuser: 1000:1000\nenv: [TOKEN, OTHER]\nenv-file: s.env\nrecreate: true\nsettle: 1e1\n"
    )
    file = parsed("up")
    Path("starling.yaml").unlink()
    words = ("--gpus", "0,2-4", "--memory", "20g", "--user", "1000:1000", "--env", "TOKEN", "--env", "OTHER")
    flags = parsed("up", *words, "--env-file", str(Path("s.env").absolute()), "--recreate", "--settle", "10")
    assert file == flags


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("memory: 1g\nmemroy: 2g\n", 2, "did you mean 'memory'?"),
        ("nothing-like-it: 1\n", 1, "the keys are"),
        ("gpus: {a: 1}\n", 1, "takes one value, found a mapping"),
        ("memory: [1g, 2g]\n", 1, "takes one value, found a list"),
        ("cpu: lots\n", 1, "'lots' is not a valid integer"),
        ("\n\nengine: ray\n", 3, "'docker'"),
        ("recreate: maybe\n", 1, "must be true or false"),
        ('recreate: "true"\n', 1, "must be true or false"),
        ("env: [TOKEN=s3cret]\n", 1, "names only"),
        ("env: {TOKEN: s3cret}\n", 1, "one of plain values"),
        ("host: ssh://machine\nhost: ssh://other\n", 2, "appears twice"),
        ("env_file: a\nenv-file: b\n", 2, "keep one of them"),
        ("train: &a {epochs: 1}\n", 1, "anchors"),
        ("memory: *a\n", 1, "aliases"),
        ("memory: !!python/object/apply:os.system [true]\n", 1, "tags"),
        ("memory: [\n", 2, "not valid YAML"),
        ("- memory\n", 1, "`key: value`"),
        ("train: '--epochs \"10'\n", 1, "quot"),
        ("train: {epochs: {a: b}}\n", 1, "one of plain values"),
        (
            "cpu: 2\ntrain: {epohs: 3}\n",
            2,
            "no setting of a training is called 'epohs' (did you mean 'epochs'?)",
        ),
        ("train: {gpus: 3}\n", 1, "no setting of a training is called 'gpus'"),
        ("a: " + "[" * 20 + "]" * 20, 1, "nested deeper"),
    ],
)
def test_what_is_wrong_is_told_with_file_line_and_remedy(text: str, line: int, says: str) -> None:
    write(text)
    with pytest.raises(UsageError) as caught:
        parsed("up")
    message = str(caught.value)
    assert message.startswith(f"{Path.cwd()}/starling.yaml:{line}: ")
    assert says in message
    assert "s3cret" not in message


def test_a_file_that_is_none_is_refused_and_a_pipe_is_not_waited_for(here: Path) -> None:
    os.mkfifo("pipe")
    (here / "huge").write_bytes(b"#" * 300_000)
    (here / "latin").write_bytes(b"memory: \xff")
    for path, says in (
        ("gone", "No such file"),
        ("pipe", "not a file"),
        (".", "directory"),
        ("huge", "KiB"),
        ("latin", "UTF-8"),
    ):
        with pytest.raises(UsageError, match=says):
            parsed("up", "--file", path)


def test_a_file_of_comments_says_nothing() -> None:
    plain = parsed("up")
    write("# nothing\n#memory: 1g\nmemory:\ncpu: null\n")
    assert parsed("up") == plain


def test_the_file_may_be_named_before_or_after_the_command(here: Path) -> None:
    write("memory: 3g\n", "other/my.yaml")
    write("memory: 1g\n")
    assert parsed("up", "-f", "other/my.yaml")["memory"] == "3g"
    assert parsed("-f", "other/my.yaml", "up")["memory"] == "3g"
    assert parsed("up")["memory"] == "1g"


def test_other_commands_take_what_they_share_and_nothing_else() -> None:
    write("runs: there\nengine: local\njson: true\nmemory: 1g\n")
    values = parsed("status")
    assert (str(values["runs"]), values["engine"], values["as_json"]) == (
        f"{Path.cwd()}/there",
        "local",
        False,
    )
    assert parsed("logs", "-f")["follow"]


def test_every_command_on_an_engine_reads_the_file() -> None:
    for name in cli.list_commands(click.Context(cli)):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        params = {param.name for param in command.params if isinstance(param, click.Option)}
        assert ("file" in params) == ("runs" in params), name


def test_doctor_looks_at_the_image_of_the_file() -> None:
    write("image: mine:1\n")
    assert parsed("doctor")["image"] == "mine:1"
    assert parsed("doctor", "--image", "other:2")["image"] == "other:2"


def test_up_says_whose_settings_it_follows(capsys: pytest.CaptureFixture[str]) -> None:
    parsed("up")
    assert capsys.readouterr().err == ""
    write("memory: 1g\n")
    parsed("up")
    assert capsys.readouterr().err == f"settings: {Path.cwd()}/starling.yaml\n"


def test_a_flag_takes_back_a_true_of_the_file() -> None:
    write("recreate: true\n")
    assert parsed("up")["recreate"]
    assert not parsed("up", "--no-recreate")["recreate"]


def test_the_kind_of_device_on_the_command_line_puts_the_files_aside() -> None:
    write("gpus: all\n")
    assert (parsed("up", "--cpu", "2")["gpus"], parsed("up", "--cpu", "2")["cpus"]) == (None, 2)
    write("cpu: 2\n")
    assert (parsed("up", "--gpus", "1")["gpus"], parsed("up", "--gpus", "1")["cpus"]) == ("1", None)


@pytest.mark.parametrize(
    "train",
    [
        "{data: bccd.yaml, epochs: 10, weights: '', single-cls: true, nosave: false, freeze: [0, 1], seed: -1}",
        "[--data, bccd.yaml, --epochs, 10, --weights, '', --single-cls, --freeze, 0, 1, --seed=-1]",
        "--data bccd.yaml --epochs 10 --weights '' --single-cls --freeze 0 1 --seed=-1",
    ],
)
def test_training_arguments_are_a_mapping_a_list_or_a_line(train: str) -> None:
    write(f"train: {train}\n")
    words = (
        "--data",
        "bccd.yaml",
        "--epochs",
        "10",
        "--weights",
        "",
        "--single-cls",
        "--freeze",
        "0",
        "1",
        "--seed=-1",
    )
    assert parsed("up")["training_args"] == words
    assert parsed("up", "--", "--epochs", "20")["training_args"] == (*words[:2], *words[4:], "--epochs", "20")


def test_words_typed_put_aside_those_of_the_file_also_by_a_prefix() -> None:
    assert without_overridden(
        ["--data", "a", "--evolve", "60", "--img=320"], ["--ev", "3", "--imgsz", "64"]
    ) == (
        "--data",
        "a",
    )


def test_a_setting_of_a_training_may_be_written_as_its_variable_or_with_a_short_name(here: Path) -> None:
    write("train: {batch_size: 4, img: 64, cos_lr: true}\n")
    assert parsed("up")["training_args"] == ("--batch-size", "4", "--img", "64", "--cos-lr")


def test_relative_paths_of_the_file_start_at_its_folder(here: Path) -> None:
    write("names: [a]\n", "job/data.yaml")
    write(
        "runs: out\nenv-file: [s.env]\ntrain: {data: data.yaml, cfg: yolov5n.yaml, hyp: ./gone.yaml, weights: /w.pt}\n",
        "job/j.yaml",
    )
    values = parsed("-f", "job/j.yaml", "up")
    assert values["runs"] == here / "job/out"
    assert values["env_files"] == (here / "job/s.env",)
    assert values["training_args"] == (
        *("--data", f"{here}/job/data.yaml", "--cfg", "yolov5n.yaml"),
        *("--hyp", f"{here}/job/gone.yaml", "--weights", "/w.pt"),
    )  # fmt: skip


def test_a_strangers_file_is_not_read_unless_it_is_named() -> None:
    write("memory: 1g\n")
    if os.getuid() != 0:
        pytest.skip("only root can give a file to somebody else")
    os.chown("starling.yaml", 12345, 12345)
    with pytest.raises(UsageError, match="another user"):
        parsed("up")
    assert parsed("up", "-f", "starling.yaml")["memory"] == "1g"


def test_a_host_in_the_file_reaches_the_engine_and_variables_win(monkeypatch: pytest.MonkeyPatch) -> None:
    def address(*words: str) -> str:
        return find_host("docker", parsed("status", *words)["host"]).engine_address

    monkeypatch.setenv("DOCKER_HOST", "tcp://variable:1")
    write("host: tcp://file:2\n")
    assert address() == "tcp://variable:1"
    assert address("--host", "tcp://flag:3") == "tcp://flag:3"
    monkeypatch.delenv("DOCKER_HOST")
    assert address() == "tcp://file:2"
    monkeypatch.setenv("DOCKER_CONTEXT", "chosen")
    with pytest.raises(EngineError, match="Docker context chosen"):
        parsed("status")


@pytest.mark.parametrize(
    "url",
    ["ssh://-oProxyCommand=touch owned", "ssh://a b", "ssh://-l@machine", "ssh://me:secret@machine", "ssh://machine:x",
     "ssh://machine/path", "machine", "ftp://machine", "ssh://"],
)  # fmt: skip
def test_a_host_that_is_none_or_would_be_an_option_of_ssh_is_refused(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        parsed("status", "--host", url)
    assert "secret" not in str(caught.value)
    assert "DOCKER_HOST" not in os.environ


def launcher(*words: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STARLING_")}
    return subprocess.run(
        [sys.executable, "-m", "launcher", *words],
        env={**clean, "PYTHONPATH": PYTHON_PATH},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_init_writes_a_file_that_works_as_it_is_and_never_overwrites(here: Path) -> None:
    assert launcher("init").returncode == 0
    written = Path("starling.yaml").read_text()
    done = launcher("up", "--engine", "local", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fleet blood/search on the local engine")
    again = launcher("init")
    assert again.returncode == 2
    assert "starling.yaml: exists already" in again.stderr
    assert Path("starling.yaml").read_text() == written
    assert launcher("init", "-").stdout == written
    assert launcher("init", "gone/x.yaml").returncode == 2


def test_init_names_every_key_and_each_of_its_examples_is_accepted() -> None:
    launcher("init", "all.yaml")
    text = Path("all.yaml").read_text()
    for key in keys_of(UP):
        assert f"\n#{key}: " in text
        [line] = [line[1:] for line in text.splitlines() if line.startswith(f"#{key}: ")]
        write(f"{line}\n")
        parsed("up")


def test_errors_of_the_file_are_exit_2_and_one_message() -> None:
    write("memroy: 1g\n")
    for command in ("up", "status", "kill-all"):
        done = launcher(command)
        assert (done.returncode, done.stdout) == (2, "")
        assert (
            done.stderr
            == f"error: {Path.cwd()}/starling.yaml:1: unknown key 'memroy' (did you mean 'memory'?)\n"
        )


def test_any_text_is_settings_or_our_own_error() -> None:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    lines = st.lists(
        st.sampled_from(["gpus", "train", "env", "settle", "x", "<<", "? a", "- b", "&a", "*a", "!t"])
    )

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(st.text(), lines.map(lambda keys: "\n".join(f"{key}: [1, {{a: b}}]" for key in keys))))
    def check(text: str) -> None:
        Path("starling.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        with contextlib.suppress(UsageError):
            parsed("up")

    check()
