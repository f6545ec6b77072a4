"""Which layouts of the host a search space names."""

from __future__ import annotations

from pathlib import Path

from launcher.hosts.files import LOCAL, HostFiles


def space_layouts(yaml_path: Path, files: HostFiles = LOCAL) -> tuple[Path, ...]:
    """Return the files below `cfg` that are there, relative ones beside the YAML, as the trainer reads them.

    What is wrong with the space is the trainer's to say: a file that cannot be read names nothing.
    """
    from starling.core.plain_yaml import MOST_BYTES, NotYaml, load_mapping

    try:
        space = load_mapping(files.read(yaml_path, MOST_BYTES + 1))
    except (OSError, NotYaml):
        return ()
    names = space.get("cfg")
    found = (
        files.real(files.expand(yaml_path.parent, name))
        for name in (names if isinstance(names, list) else ())
        if isinstance(name, str) and name.endswith((".yaml", ".yml"))
    )
    return tuple(path for path in found if files.is_file(path))
