"""Messages for an existing path of the wrong kind for an option: a folder for a file, an export for weights."""

from __future__ import annotations

from pathlib import Path

from starling.core.places import Place, look_at, names_in

_YAML = (".yaml", ".yml")
_ARCHIVES = frozenset((".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst"))
_MOST_NAMED = 5


def misplaced(option: str, path: Path) -> str | None:
    """Return the problem and the remedy if `path` is of the wrong kind for `option` (`--data`, `--weights`, …).

    None if the path does not exist, or if its kind may be right.
    """
    place = look_at(path)
    if place is None:
        return None
    if option == "--data":
        return _for_data(path, place)
    if option == "--weights":
        return _for_weights(path, place)
    if place.kind == "file":
        return None
    return f"is {place.words}; give a YAML file"


def _for_data(path: Path, place: Place) -> str | None:
    if place.kind == "folder":
        return _folder_of_data(path)
    if place.kind == "archive":
        return f"is {place.words}; unpack it, and give the dataset YAML in it"
    if place.kind == "table":
        return (
            f"is {place.words}, not a dataset YAML; write a YAML with train:, val: and names:, and convert the "
            "annotations with starling data convert (docs/data.md)"
        )
    if place.kind != "file" or path.suffix.lower() in (".txt", ".names", ".data"):
        return f"is {place.words}, not a dataset YAML; give a YAML with train:, val: and names:"
    return None


def _folder_of_data(folder: Path) -> str:
    found = [str(folder / name) for name in names_in(folder, _YAML, _MOST_NAMED)]
    if not found:
        below = sorted(one for one in _folders(folder) if names_in(one, _YAML, 1))
        found = [str(one / names_in(one, _YAML, 1)[0]) for one in below[:_MOST_NAMED]]
    if found:
        return f"is a folder; give the dataset YAML in it: {', '.join(found)}"
    images = "images" if (folder / "images").is_dir() else "."
    train = next((one for one in ("train", "images/train") if (folder / one).is_dir()), images)
    val = next((one for one in ("val", "valid", "images/val", "test") if (folder / one).is_dir()), train)
    names = " (the lines of its classes.txt, in their order)" if (folder / "classes.txt").is_file() else ""
    return (
        f"is a folder without a dataset YAML; write {folder / 'data.yaml'} with the lines `path: .`, `train: {train}`, "
        f"`val: {val}` and `names: [...]`{names}, and give that"
    )


def _folders(folder: Path) -> list[Path]:
    try:
        return [one for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".")]
    except OSError:
        return []


def _for_weights(path: Path, place: Place) -> str | None:
    if place.kind == "folder":
        for folder in (path, path / "weights"):
            if found := names_in(folder, (".pt",), _MOST_NAMED):
                return (
                    f"is a folder; give a .pt file in it: {', '.join(str(folder / name) for name in found)}"
                )
        return "is a folder without a .pt file; give the path of a .pt file"
    if place.kind == "model":
        return f"is {place.words}, which is not trained or read here; give the .pt file that it was exported from"
    if path.suffix.lower() in _YAML:
        return f"is {place.words}, not weights; a layout goes to --cfg, a dataset to --data"
    if path.suffix.lower() in _ARCHIVES and place.kind == "archive":
        return f"is {place.words}; unpack it, and give the .pt file in it"
    if place.kind in ("image", "table", "special"):
        return f"is {place.words}, not weights; give the path of a .pt file"
    return None
