"""Run readers on hostile files in a process of their own, within bounds of time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

SECONDS = 20
MIB = 1024
_CODE = """
import json, resource, sys, time
from pathlib import Path
{imports}
errors = ({errors},)
def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
    return int(line.split()[1]) * 1024
limit = resident() + {mib} * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in map(Path, json.load(sys.stdin)):
    for read in ({readers},):
        began = time.process_time()
        try:
            read(path)
            said = "taken"
        except errors as error:
            said = str(error)
        except MemoryError:
            sys.exit(f"{{path.name}}: out of memory")
        except BaseException as error:
            sys.exit(f"{{path.name}}: {{type(error).__name__}}: {{str(error)[:200]}}")
        took = time.process_time() - began
        if took > {seconds}:
            sys.exit(f"{{path.name}}: took {{took:.1f}} s")
        if len(said) > 2000 or len(said.splitlines()) > 1 or not said.isprintable():
            sys.exit(f"{{path.name}}: no clear message: {{said[:300]!r}}")
        print(json.dumps([path.name, round(took, 2), said]), flush=True)
"""


def read_all(
    paths: list[Path],
    readers: list[str],
    *,
    errors: str = "StarlingError",
    imports: str = "from starling.errors import StarlingError",
    mib: int = MIB,
    seconds: float = SECONDS,
) -> list[tuple[str, float, str]]:
    """Return (file, seconds, message or `taken`) for each file and reader; fails where anything else came out."""
    code = _CODE.format(imports=imports, errors=errors, readers=", ".join(readers), mib=mib, seconds=seconds)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        input=json.dumps([str(path) for path in paths]),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    said = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {said[-1:]}: {done.stderr[-2000:]} (status {done.returncode})"
    return said
