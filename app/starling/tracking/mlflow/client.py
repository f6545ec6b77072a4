"""MLflow's client, kept from blocking: its limits, the time an upload may take, its errors in our words, and its login.

The login comes from a file: a variable can be read by whoever may look at the container.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

from starling.core.budget import BudgetExceeded
from starling.core.errors import StarlingError
from starling.core.files.folder import LinkRefused
from starling.core.files.refusals import FileRefused
from starling.core.files.regular import read_regular
from starling.core.redaction import without_credentials
from starling.core.utf8 import NotUtf8, text_of
from starling.tracking.tracker import TrackerRejectedError, TrackerUnavailableError

CLIENT_LIMITS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
    # A server may neither hold the client for as long as it likes nor send it elsewhere.
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_ALLOW_HTTP_REDIRECTS": "false",
    # Nothing but the tracking server is spoken to.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Settings of MLflow's client; by default it blocks for minutes when its server is gone. A user's own win."""

_UPLOAD_TIMEOUT_S = 60
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}


@contextmanager
def patient() -> Iterator[None]:
    """Allow an upload more time than a small request: a server may answer once it has stored the file."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name)
    os.environ[name] = str(max(_UPLOAD_TIMEOUT_S, int(before or 0)))
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextmanager
def translated(*, refuse: bool = True) -> Iterator[None]:
    """Turn what MLflow's client raises into the two errors of the protocol.

    `refuse=False` treats a refusal like an outage: without its run, every later event would be lost.
    """
    try:
        yield
    except (StarlingError, LinkRefused, FileRefused):
        raise
    except Exception as error:
        # Anything: the client passes on whatever its parsers raise when a server answers nonsense.
        lines = without_credentials(str(error)).strip().splitlines() or [""]
        message = f"MLflow: {type(error).__name__}: {lines[0][:300]}"
        if refuse and getattr(error, "error_code", "") in _REFUSALS:
            raise TrackerRejectedError(message) from error
        raise TrackerUnavailableError(message) from error


PASSWORD, PASSWORD_FILE = "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_PASSWORD_FILE"
_MOST_BYTES = 1 << 20


def read_password(environment: Mapping[str, str], client: MutableMapping[str, str]) -> None:
    """Give MLflow's client, which looks into `client`, the password in the file that the variable names.

    It is read again at every connection, so that a changed one is taken. Raises TrackerUnavailableError for a file
    that cannot be read: it may come back.
    """
    named = environment.get(PASSWORD_FILE)
    if not named:
        return
    try:
        client[PASSWORD] = text_of(read_regular(named, _MOST_BYTES), named).strip()
    except (OSError, NotUtf8, BudgetExceeded) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "problem", None)
        reason = reason or "not text of a password's length"
        raise TrackerUnavailableError(f"{PASSWORD_FILE}={named}: cannot be read ({reason})") from None
