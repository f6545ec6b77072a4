"""The console command `starling`, the classic's scripts beside it, and the names that users import."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from starling.__main__ import COMMANDS, main
from tests.conftest import PYTHON_PATH, REPOSITORY

SCRIPTS = sorted((REPOSITORY / "app").glob("*.py"))
STRANGER = "raise SystemExit('this is a module of the user, and nobody asked for it')\n"


@pytest.fixture
def users_folder(tmp_path: Path) -> Path:
    """Return a folder that holds modules of the user's, with the names of folders of this project and of its scripts."""
    for name in ("app", "launcher", "train", "val", "settings", "hooks"):
        (tmp_path / f"{name}.py").write_text(STRANGER)
    return tmp_path


def run(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("words", [["starling", "val", "--help"], ["launcher", "up", "--help"]])
def test_installed_commands_work_in_a_folder_with_modules_of_the_users(
    users_folder: Path, words: list[str]
) -> None:
    program = Path(sys.executable).with_name(words[0])
    assert program.is_file(), "the development install (scripts/test) makes it"
    done = run(users_folder, str(program), *words[1:])
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage" in done.stdout.lower()


def test_the_package_is_imported_in_a_folder_with_modules_of_the_users(users_folder: Path) -> None:
    code = "import starling; from starling import hooks, settings; print(hooks.__name__, settings.__name__)"
    done = run(users_folder, sys.executable, "-c", code, PYTHONPATH=PYTHON_PATH)
    assert done.stdout.split() == ["starling.training.reporting.hooks", "starling.settings"], done.stderr


def test_importing_the_package_needs_no_other(tmp_path: Path) -> None:
    code = "import sys; import starling; print(len(starling.__version__) > 0, 'yaml' in sys.modules)"
    done = run(tmp_path, sys.executable, "-S", "-c", code, PYTHONPATH=str(REPOSITORY / "app"))
    assert done.stdout.split() == ["True", "False"], done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_of_the_classics_is_one_call(script: Path) -> None:
    assert len(script.read_text().splitlines()) <= 12
    imported = {
        node.module for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ImportFrom)
    }
    assert all(str(module).startswith("starling.") for module in imported)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_a_module_with_a_main_and_answers_with_help(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["starling"])
    assert callable(importlib.import_module(f"starling.cli.{name}").main)
    try:
        code = main([name, "--help"])
    except SystemExit as end:
        code = int(end.code or 0)
    assert code == 0
    assert f"starling {name}" in capsys.readouterr().out


def test_help_names_every_command_and_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["help"]):
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown for name in COMMANDS)
        assert "--evolve" in shown


def test_a_command_that_does_not_exist_is_2_with_the_one_that_was_meant(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["tran"]) == 2
    assert "no command 'tran'; did you mean train?" in capsys.readouterr().err
    assert main(["\x1b[2J"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_the_console_command_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("starling 0.")


def test_help_of_a_command_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from starling.__main__ import main\n"
        "for name in ('train', 'val', 'data', 'search'):\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit: pass\n"
        "print({'torch', 'numpy', 'cv2', 'optuna'} & set(sys.modules), file=sys.stderr)"
    )
    done = run(tmp_path, sys.executable, "-c", code, PYTHONPATH=PYTHON_PATH)
    assert done.stderr == "set()\n"


def test_a_command_whose_packages_are_missing_names_them_and_the_remedy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from starling.__main__ import main\n"
        "sys.exit(main(['val', '--weights', 'x.pt']))"
    )
    (tmp_path / "x.pt").touch()
    done = run(tmp_path, sys.executable, "-c", code, PYTHONPATH=PYTHON_PATH)
    assert done.returncode == 2
    assert done.stderr.startswith("starling val: needs torch, which is not installed; ")
    assert "pip install -r requirements.txt" in done.stderr
