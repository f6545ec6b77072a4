"""The two packages share the ground floor only, and the launcher starts quickly."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

FORBIDDEN = {
    "launcher": {"starling", "torch", "torchvision", "cv2", "optuna", "mlflow", "numpy"},
    "app": {"launcher", "docker", "app"},
}


GROUND_FLOOR = "starling.core"


def imported(path: Path) -> Iterator[str]:
    """Yield the packages that a file imports; the ground floor, which both stand on, as itself."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        for name in names:
            yield GROUND_FLOOR if f"{name}.".startswith(f"{GROUND_FLOOR}.") else name.split(".")[0]


def test_the_ground_floor_needs_nothing_but_yaml_beside_the_standard_library() -> None:
    names = {name for path in (REPOSITORY / "app/starling/core").rglob("*.py") for name in imported(path)}
    assert names <= {*sys.stdlib_module_names, "yaml", GROUND_FLOOR}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_the_launcher_and_the_trainer_meet_on_the_ground_floor_only(package: str) -> None:
    files = sorted((REPOSITORY / package).rglob("*.py"))
    assert files
    wrong = {
        f"{path.relative_to(REPOSITORY)}: {name}"
        for path in files
        for name in imported(path)
        if name in FORBIDDEN[package]
    }
    assert wrong == set()


def test_help_imports_neither_docker_nor_rich_nor_yaml() -> None:
    code = (
        "import sys; from launcher.cli.main import cli; cli.main(['up', '--help'], standalone_mode=False);"
        "print(sorted({'docker', 'rich', 'yaml', 'psutil', 'pynvml', 'requests'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_supervisors_need_nothing_but_the_standard_library_and_the_ground_floor() -> None:
    names = {
        name
        for module in ("supervisor", "memory_limit")
        for name in imported(REPOSITORY / f"launcher/engines/local/{module}.py")
    }
    assert names <= {*sys.stdlib_module_names, GROUND_FLOOR}
    done = subprocess.run(
        [sys.executable, "-S", "app/supervise.py", "--", "true"],
        cwd=REPOSITORY,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b""), "without site-packages"
