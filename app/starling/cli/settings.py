"""Show or change persistent settings.

    starling settings                  show them
    starling settings mlflow=False     change one
    starling settings reset            back to the defaults

The settings are in `$STARLING_RUNS/settings.json` if that variable is set (so that all replicas of a fleet share
them), otherwise in `$XDG_CONFIG_HOME/starling/settings.json`, by default `~/.config/starling/settings.json`.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from starling import settings
from starling.core.errors import StarlingError, UsageError

_WORDS = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}


def main(arguments: list[str] | None = None) -> int:
    """Show, change or reset the settings; return the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    try:
        if words == ["reset"]:
            current = settings.reset()
        elif words:
            current = settings.update(_parse_changes(words))
        else:
            current = settings.read()
    except StarlingError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name, value in asdict(current).items():
        print(f"{name}={value}")
    return 0


def _parse_changes(words: list[str]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"{word!r}: write name=True, name=False, or reset")
        changes[name] = _WORDS.get(value.lower(), value)
    return changes
