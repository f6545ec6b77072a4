"""What modules log, and who shows it: the console of a command, its trackers, or the program that imports a package."""

from __future__ import annotations

import errno
import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from starling.core.files.refusals import DiskRefused
from starling.core.log_lines import PACKAGES, lines_to
from starling.progress import Progress, Silence, aloud, console, on_console, quiet
from tests.conftest import PYTHON_PATH

LOGGER = logging.getLogger("starling.somewhere")


def test_a_command_shows_what_modules_log_word_for_word_and_tells_its_listener() -> None:
    stream, heard = io.StringIO(), list[str]()
    with on_console(Progress(stream, prefix="candidate 1  ")) as progress:
        LOGGER.info("100%s of it")
        progress.listen(heard.append)
        progress.say("said by the command")
        logging.getLogger("launcher.somewhere").warning("left out: %s", "x")
        LOGGER.debug("for developers")
    lines = ["100%s of it", "said by the command", "left out: x"]
    assert stream.getvalue().splitlines() == [f"candidate 1  {line}" for line in lines]
    assert heard == lines


def test_a_line_that_does_not_get_through_to_a_full_disk_ends_the_command() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with on_console(Progress(Full())), pytest.raises(DiskRefused, match="the console"):
        LOGGER.info("a line")


def test_a_command_leaves_the_loggers_as_they_were() -> None:
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), on_console(Progress(stream)):
        raise KeyboardInterrupt
    LOGGER.warning("after its end")
    assert [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers] == before
    assert stream.getvalue() == ""
    assert isinstance(console(), Silence)


def test_a_root_logger_that_a_library_sets_up_does_not_print_a_line_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    again = logging.StreamHandler(sys.stdout)
    logging.getLogger().addHandler(again)
    try:
        with on_console(Progress()):
            LOGGER.warning("once")
    finally:
        logging.getLogger().removeHandler(again)
    assert capsys.readouterr().out == "once\n"


def test_a_quiet_part_says_nothing_and_the_lines_around_it_stay() -> None:
    stream = io.StringIO()
    with on_console(Progress(stream)):
        LOGGER.info("before")
        with quiet():
            LOGGER.warning("looked at")
        LOGGER.info("after")
    assert stream.getvalue() == "before\nafter\n"


def test_a_silent_rank_tells_aloud_what_it_does_for_all() -> None:
    stream = io.StringIO()
    with on_console(Silence(Progress(stream))):
        LOGGER.info("as every rank")
        with aloud() as progress:
            LOGGER.info("decoded")
            progress.say("by this one")
    assert stream.getvalue() == "decoded\nby this one\n"


def test_lines_of_nested_commands_come_once() -> None:
    outer, inner = io.StringIO(), io.StringIO()
    with on_console(Progress(outer)), on_console(Progress(inner)):
        LOGGER.info("one")
    assert (outer.getvalue(), inner.getvalue()) == ("", "one\n")


def test_all_that_is_logged_reaches_the_receiver_of_lines(said: list[str]) -> None:
    more: list[str] = []
    with lines_to(more.append):
        LOGGER.info("a")
    LOGGER.info("b")
    assert (said, more) == (["a", "b"], ["a"])


@pytest.mark.parametrize("configured", [False, True])
def test_a_program_that_trains_by_an_import_sees_lines_only_if_it_configures_logging(
    tiny_args: list[str], runs: Path, configured: bool
) -> None:
    code = (
        "import logging, sys; from starling.core.settings.train import parse_args\n"
        f"if {configured}: logging.basicConfig(level=logging.INFO, format='%(name)s | %(message)s', stream=sys.stdout)\n"
        "from starling.training.training import train\n"
        "train(parse_args(sys.argv[1:]))"
    )
    words = [*tiny_args, "--epochs", "1", "--noplots", "--rect"]
    environment = {
        "PYTHONPATH": PYTHON_PATH,
        "STARLING_RUNS": str(runs),
        "HOME": str(runs),
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line for line in lines if "run: " in line] == (
        [f"starling.training.training | run: {runs}/train/exp"] if configured else []
    )
    assert configured or not lines


@pytest.mark.parametrize("words", [["--help"], ["up", "--help"]])
def test_help_of_the_launcher_is_not_kept_waiting_by_logging(words: list[str]) -> None:
    code = (
        "import sys; from launcher.cli.main import main\n"
        f"try: main({words})\n"
        "except SystemExit: print('logging' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": PYTHON_PATH},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == "False\n"
