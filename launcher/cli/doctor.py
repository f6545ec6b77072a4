"""`launcher doctor`: is everything there that `up` will need?"""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, cast

import click

from launcher.cli.context import Target, shared
from launcher.options.config_file import ConfiguredCommand
from starling.core.errors import UsageError
from starling.core.paths import absolute

if TYPE_CHECKING:
    from launcher.doctor.examine import ContainerEngine


@click.command(cls=ConfiguredCommand)
@click.option("--image", default="starling:latest", show_default=True, help="The trainers' image.")
@click.option("--gpu", metavar="ID", help="Try this GPU, an index or a UUID [the first].")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@shared
def doctor(target: Target, image: str, gpu: str | None, as_json: bool) -> None:
    """Check everything that `up` needs: engine, image, GPUs, limits, disks, runs folder, tracking server.

    The check starts one container like a replica's, on a GPU if there is one, and removes it; nothing else changes.
    Exits 5 when a check failed; warnings do not change the exit code.
    """
    from launcher.doctor.examine import examine_docker, examine_local
    from launcher.doctor.findings import as_document, as_lines, exit_code

    if gpu is not None and not re.fullmatch(r"\d{1,4}|(?:GPU|MIG)-[0-9A-Za-z/_-]{4,80}", gpu, re.ASCII):
        raise UsageError(f"--gpu {gpu}: must be an index or a UUID, as `nvidia-smi -L` lists them")
    if target.engine == "local":
        if gpu is not None:
            raise UsageError("--gpu: is tried in a container; leave it out with --engine local")
        target.open_engine()
        findings = examine_local(absolute(target.runs))
    else:
        host = target.find_host()
        runs = host.files.expand(host.files.start, str(target.runs))
        findings = examine_docker(
            lambda: cast("ContainerEngine", target.open_engine(host)), host, runs, image, gpu
        )
    if as_json:
        click.echo(json.dumps(as_document(findings), indent=2))
    else:
        click.echo("\n".join(as_lines(findings)))
    sys.exit(exit_code(findings))
