"""The house's walls: imports point down the list only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

STOREYS = [
    ["starling.__main__"],
    ["starling.cli", "starling.supervise"],
    ["starling.search"],
    ["starling.training", "starling.export"],
    ["starling.evaluation"],
    ["starling.prediction"],
    ["starling.plots"],
    ["starling.distributed", "starling.metrics"],
    ["starling.model"],
    ["starling.boxes", "starling.data"],
    ["starling.compiled", "starling.device", "starling.progress", "starling.stop_signal"],
    ["starling.tracking"],
    ["starling.settings"],
    ["starling.config"],
    ["starling.outputs"],
    ["starling.errors"],
    ["starling.core"],
]
"""From the roof to the ground; a module imports from its own storey's room and from storeys below."""

APP = REPOSITORY / "app"
MODULES = sorted((APP / "starling").rglob("*.py"))
SCRIPTS = sorted(APP.glob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(APP).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def storey(module: str) -> int | None:
    for level, rooms in enumerate(STOREYS):
        if any(module == room or module.startswith(f"{room}.") for room in rooms):
            return level
    return None


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            # `from starling import settings` names the module in the list
            found.update(f"starling.{alias.name}" for alias in node.names if node.module == "starling")
    return {name for name in found if name.split(".")[0] == "starling"} - {"starling", "starling.__version__"}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down_the_list_only(path: Path) -> None:
    own = module_name(path)
    if own == "starling":
        return
    level = storey(own)
    assert level is not None, f"{own} has no storey; add it to the list"
    for target in imports(path):
        below = storey(target)
        assert below is not None, f"{own} imports {target}, which has no storey"
        assert room(target) == room(own) or below > level, f"{own} imports {target}, which is not below it"
