"""The last steps of a finished training: report the result, copy the files to a bucket, mark the run as finished."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from starling.core.settings.train import TrainConfig
from starling.outputs.bucket import upload
from starling.outputs.run_dir import RunDir
from starling.training.checkpoint import kept_row, unscored
from starling.training.reporting.results import EpochRow
from starling.training.resume.ending import figures_of, read_account, write_mark

logger = logging.getLogger(__name__)


def deliver(
    config: TrainConfig,
    run: RunDir,
    rows: Sequence[EpochRow],
    run_uuid: str,
    *,
    again: bool = False,
) -> None:
    """Report the result of a finished training, copy its files to `--bucket`, and mark the run as finished.

    `again`: an earlier call has copied the files, and this call only reports.
    """
    best = kept_row(rows)
    reached = f"best mAP50-95 {best.metrics[3]:.3f} (mAP50 {best.metrics[2]:.3f}) in epoch {best.epoch + 1}"
    logger.info(f"{unscored(rows) or reached}; results in {run.path}")
    delivered = again or upload_results(config, run.path)
    if config.json:
        print(json.dumps({**figures_of(rows, run), **read_account(run)}), flush=True)
    if delivered and not again:  # without the mark, a resume tries a failed copy again
        write_mark(run, rows, run_uuid)


def upload_results(config: TrainConfig, folder: Path) -> bool:
    """Copy the results to `--bucket`, if one is given; return whether all went well."""
    if not config.bucket:
        return True
    project = config.run_project.removeprefix("runs/")
    below = Path(project).name if Path(project).is_absolute() else project
    return upload(folder, f"{config.bucket.rstrip('/')}/{below}/{folder.name}")
