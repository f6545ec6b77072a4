"""The house's walls: imports point down the list only, nothing goes in a circle, and no room is crowded."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

FOLDERS = {"starling": REPOSITORY / "app", "launcher": REPOSITORY}
"""Each package, and the folder that holds it."""
STOREYS = {
    "starling": [
        ["starling.__main__"],
        ["starling.cli", "starling.supervise"],
        ["starling.tracking.clearml.search"],
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
    ],
    "launcher": [
        ["launcher.__main__"],
        ["launcher.cli"],
        ["launcher.doctor", "launcher.servers"],
        ["launcher.fleet"],
        ["launcher.plan"],
        ["launcher.options"],
        ["launcher.status"],
        ["launcher.engines", "launcher.console"],
        ["launcher.engines.base", "launcher.engines.limits"],
        ["launcher.hosts"],
        ["launcher.devices"],
        ["launcher.problems"],
        ["starling.core.units", "launcher.parallel", "starling.core.units"],
        ["launcher.errors"],
    ],
}
"""From the roof to the ground; a module imports from its own room and from storeys below."""
MOST_MODULES = {"starling": 20, "launcher": 15}
"""In one folder."""


def module_name(path: Path) -> str:
    top = next(folder for name, folder in FOLDERS.items() if path.is_relative_to(folder / name))
    parts = path.relative_to(top).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for name, folder in FOLDERS.items()
    for path in sorted((folder / name).rglob("*.py"))
}


def place(module: str) -> tuple[int, str] | None:
    """Return the storey and the room of a module: those of the longest name that it begins with."""
    rooms = [
        (level, room)
        for level, names in enumerate(STOREYS[module.split(".")[0]])
        for room in names
        if module == room or module.startswith(f"{room}.")
    ]
    return max(rooms, key=lambda found: len(found[1]), default=None)


def imports(module: str) -> Iterator[str]:
    """Yield the modules of this project that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in MODULES:
                name = name.rpartition(".")[0]
            if name and name != module:
                yield name


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_the_list_only(module: str) -> None:
    if module in FOLDERS:
        return
    own = place(module)
    assert own is not None, f"{module} has no storey; add its room to the list"
    for target in imports(module):
        if target.split(".")[0] != module.split(".")[0] or target in FOLDERS:
            continue
        below = place(target)
        assert below is not None, f"{module} imports {target}, which has no storey"
        assert below[1] == own[1] or below[0] > own[0], f"{module} imports {target}, which is not below it"


def test_no_imports_go_in_a_circle_inside_functions_included() -> None:
    graph = {module: set(imports(module)) - set(FOLDERS) for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


OWN_TRAINER = ("training", "yolo", "winner", "reporting", "space_file", "importing")
"""Modules of the search that know what is trained. The others search with any `CandidateTrainer`."""
WHAT_IS_TRAINED = (
    "starling.training", "starling.model", "starling.data", "starling.evaluation", "starling.prediction",
    "starling.boxes", "starling.distributed", "starling.tracking", "starling.core.settings.train",
    "starling.config.hyp",
)  # fmt: skip


def test_the_worker_of_a_search_knows_nothing_of_what_is_trained() -> None:
    own = tuple(f"starling.search.{name}" for name in OWN_TRAINER)
    general = [m for m in MODULES if m.startswith("starling.search") and m not in own]
    assert {"starling.search.worker", "starling.search.study", "starling.search.report.page"} <= set(general)
    importers: dict[str, str] = {}
    found = list(general)
    while found:
        module = found.pop()
        for target in imports(module):
            if target not in importers:
                importers[target] = module
                found.append(target)
    reached = {
        target: importer
        for target, importer in importers.items()
        if target.startswith((*WHAT_IS_TRAINED, *own))
    }
    assert reached == {}, "module: by whom it is imported"


@pytest.mark.parametrize("package", FOLDERS)
def test_no_folder_holds_more_modules_than_a_reader_takes_in(package: str) -> None:
    counts: dict[str, int] = {}
    for module, path in MODULES.items():
        if module.split(".")[0] == package and path.name != "__init__.py":
            counts[str(path.parent)] = counts.get(str(path.parent), 0) + 1
    crowded = {folder: count for folder, count in counts.items() if count > MOST_MODULES[package]}
    assert crowded == {}


@pytest.mark.parametrize(
    ("name", "home"),
    [("flock", "starling.core.lock"), ("lockf", None), ("get_close_matches", "starling.core.errors")],
)
def test_what_both_packages_need_is_called_in_one_place(name: str, home: str | None) -> None:
    callers = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and (getattr(node.func, "attr", None) == name or getattr(node.func, "id", None) == name)
    }
    assert callers == ({home} if home else set())


@pytest.mark.parametrize(
    ("words", "home"),
    [
        ("random/boot_id", "starling.core.process"),
        ("/sys/fs/cgroup", "starling.core.cgroups"),
        ("oom_kill", "starling.core.cgroups"),
    ],
)
def test_what_the_kernel_tells_is_read_in_one_place(words: str, home: str) -> None:
    readers = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and (node.value == words or node.value.endswith(words))
    }
    assert readers == {home}


BESIDE = [path for folder in ("bench", "examples", "scripts") for path in (REPOSITORY / folder).rglob("*.py")]


@pytest.mark.parametrize("path", BESIDE, ids=lambda path: path.name)
def test_benches_and_examples_import_modules_that_are_there(path: Path) -> None:
    named = {
        node.module
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in FOLDERS
    }
    assert {module for module in named if module not in MODULES} == set()


LARGEST_FILE = 1_000_000
"""Bytes."""


def tracked_files() -> list[Path]:
    """Return the files that git tracks; where these sources are no clone, those in folders that are not hidden."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode == 0:
        names = [Path(name) for name in listed.stdout.split("\0") if name]
    else:
        names = [path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*")]
        names = [name for name in names if name.parts[0] != "runs" and not name.parts[0].startswith(".")]
    return [name for name in names if (REPOSITORY / name).is_file()]


def test_no_tracked_file_is_over_a_megabyte_outside_datasets_and_docs() -> None:
    files = [name for name in tracked_files() if name.parts[0] not in ("datasets", "docs")]
    assert len(files) > 500
    sizes = {str(name): (REPOSITORY / name).stat().st_size for name in files}
    assert {name: size for name, size in sizes.items() if size > LARGEST_FILE} == {}
