"""The words of a training command line: the setting of each flag, and the value of each setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from starling.core.settings.train import COMMAND

PATH_SETTINGS = ("data", "weights", "hyp", "cfg", "space", "hooks", "resume")
"""The settings whose values are paths."""


class TrainingWords:
    """A command line whose settings can be read and replaced; of two flags for one setting, the last counts."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)

    @property
    def words(self) -> tuple[str, ...]:
        """The current words."""
        return tuple(self._words)

    def get(self, setting: str) -> str | None:
        """Return the value given for a setting; None if there is none."""
        at = self._find(setting)
        if at is None:
            return None
        if "=" in self._words[at]:
            return self._words[at].split("=", 1)[1]
        following = self._words[at + 1] if at + 1 < len(self._words) else None
        return None if following is None or following.startswith("--") else following

    def set(self, setting: str, value: str) -> None:
        """Replace the value given for a setting; a setting that is not given stays absent."""
        at = self._find(setting)
        if at is None:
            return
        if "=" in self._words[at]:
            self._words[at] = self._words[at].split("=", 1)[0] + "=" + value
        else:
            self._words[at + 1] = value

    def _find(self, setting: str) -> int | None:
        """Return the index of the last word that is a flag of the setting, in any spelling or as any prefix."""
        found = [at for at, word in enumerate(self._words) if setting_of(word) == setting]
        return found[-1] if found else None


def setting_of(word: str) -> str | None:
    """Return the setting whose flag a word is; None for a value or an unknown flag."""
    declared = COMMAND.setting_of(word.split("=", 1)[0])
    return None if declared is None else declared.field


def relative_to(words: Sequence[str], folder: Path) -> tuple[str, ...]:
    """Make relative paths in training arguments start at `folder`; names of files that the trainer ships stay."""
    values = TrainingWords(words)
    for setting in PATH_SETTINGS:
        given = values.get(setting)
        if given and "://" not in given and not given.startswith(("~", "/")):
            path = folder / given
            if "/" in given or path.exists():
                values.set(setting, str(path))
    return values.words


def without_overridden(words: Sequence[str], winners: Sequence[str]) -> tuple[str, ...]:
    """Return `words` without the flags, and their values, of settings that `winners` also give."""
    given = {setting_of(word) for word in winners if word.startswith("--")} - {None}
    kept: list[str] = []
    dropping = False
    for word in words:
        if word.startswith("--"):
            dropping = setting_of(word) in given
        if not dropping:
            kept.append(word)
    return tuple(kept)
