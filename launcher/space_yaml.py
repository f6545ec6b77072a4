"""Which layouts of the host a search space names."""

from __future__ import annotations

from pathlib import Path

MOST_BYTES = 1024**2
"""No space comes near; a larger file is something else."""


def space_layouts(yaml_path: Path) -> tuple[Path, ...]:
    """Return the files below `cfg` that are there, relative ones beside the YAML, as the trainer reads them.

    What is wrong with the space is the trainer's to say: a file that cannot be read names nothing.
    """
    import yaml

    try:
        with yaml_path.open("rb") as file:
            space = yaml.safe_load(file.read(MOST_BYTES))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError):
        return ()
    names = space.get("cfg") if isinstance(space, dict) else None
    found = (
        (yaml_path.parent / Path(name).expanduser()).resolve()
        for name in (names if isinstance(names, list) else ())
        if isinstance(name, str) and name.endswith((".yaml", ".yml"))
    )
    return tuple(path for path in found if path.is_file())
