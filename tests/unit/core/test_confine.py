"""A trainer that keeps a power of root's to read may write in its own folders only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from starling.core import confine


@pytest.mark.skipif(
    confine.landlock_version() < confine.NEEDED_VERSION, reason="the kernel offers no Landlock of version 3"
)
def test_a_confined_program_writes_below_its_folders_and_reads_everywhere(tmp_path: Path) -> None:
    for name in ("runs", "home"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("old")
    code = (
        "import os, sys, pathlib\n"
        f"sys.path.insert(0, {str(Path(confine.__file__).parents[2])!r})\n"
        "from starling.core.confine import confine\n"
        "confine(['runs', 'gone'])\n"
        "for act in (lambda p: open(p, 'w').write('new'), lambda p: os.truncate(p, 0), os.unlink,"
        " lambda p: os.rename(p, p + '2'), lambda p: os.mkdir(p + '3')):\n"
        "    for top in ('home', 'runs'):\n"
        "        try:\n"
        "            act(top + '/file')\n"
        "        except OSError as error:\n"
        "            print(top, type(error).__name__)\n"
        "print(pathlib.Path('home/file').read_text())\n"
    )
    done = subprocess.run(
        ["setpriv", "--no-new-privs", sys.executable, "-I", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said.count("home PermissionError") == 5
    assert said.count("runs PermissionError") == 0
    assert said[-1] == "old"


def test_a_command_that_is_not_there_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confine, "confine", lambda folders: None)
    assert confine.main(["runs", "no-such-command"]) == 127
    assert "no-such-command" in capsys.readouterr().err
