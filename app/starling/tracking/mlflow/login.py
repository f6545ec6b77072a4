"""The login of a tracking server from a file: a variable can be read by whoever may look at the container."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from starling.core.budget import BudgetExceeded
from starling.core.files.regular import read_regular
from starling.core.utf8 import NotUtf8, text_of
from starling.tracking.tracker import TrackerUnavailableError

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
