"""Addresses and credentials of a ClearML server, from the environment or from the file that `clearml-init` writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starling.core.errors import UsageError
from starling.core.files.refusals import readable
from starling.core.paths import at_home

API_HOST, WEB_HOST, FILES_HOST = "https://api.clear.ml", "https://app.clear.ml", "https://files.clear.ml"
"""ClearML's hosted service, the SDK's default for credentials without addresses."""

REMEDY = (
    "set CLEARML_API_HOST, CLEARML_WEB_HOST, CLEARML_FILES_HOST, CLEARML_API_ACCESS_KEY and "
    "CLEARML_API_SECRET_KEY (ClearML: Settings, Workspace, Create new credentials), or run clearml-init"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """The addresses of a server's three parts, and a key pair."""

    api_host: str
    web_host: str
    files_host: str
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    verify: bool | str = True
    """Whether certificates are checked, or the path of a certificate bundle."""


def config_file(environment: Mapping[str, str]) -> Path:
    """Return the path of ClearML's configuration file, which need not exist."""
    given = environment.get("CLEARML_CONFIG_FILE")
    return at_home(given) if given else Path(environment.get("HOME") or Path.home()) / "clearml.conf"


def is_configured(environment: Mapping[str, str]) -> bool:
    """Return whether there is a key pair, or a file that may hold one; fast, without imports."""
    keys = environment.get("CLEARML_API_ACCESS_KEY") and environment.get("CLEARML_API_SECRET_KEY")
    try:
        return bool(keys) or config_file(environment).is_file()
    except PermissionError:
        return True  # reading the file will report the error


@readable(UsageError)
def find_credentials(environment: Mapping[str, str]) -> Credentials | None:
    """Return the credentials of the environment, completed from the configuration file; None without a key pair.

    Raises UsageError for an unreadable file.
    """
    complete = all(environment.get(f"CLEARML_API_{name}") for name in ("HOST", "ACCESS_KEY", "SECRET_KEY"))
    stored = _read_config(config_file(environment), needed=not complete)

    def setting(variable: str, path: str, default: str = "") -> str:
        return environment.get(variable) or str(_at(stored, path) or default)

    access_key = setting("CLEARML_API_ACCESS_KEY", "api.credentials.access_key")
    secret_key = setting("CLEARML_API_SECRET_KEY", "api.credentials.secret_key")
    if not access_key or not secret_key:
        return None
    return Credentials(
        api_host=setting("CLEARML_API_HOST", "api.api_server", API_HOST).rstrip("/"),
        web_host=setting("CLEARML_WEB_HOST", "api.web_server", WEB_HOST).rstrip("/"),
        files_host=setting("CLEARML_FILES_HOST", "api.files_server", FILES_HOST).rstrip("/"),
        access_key=access_key,
        secret_key=secret_key,
        verify=_verification(setting("CLEARML_API_HOST_VERIFY_CERT", "api.verify_certificate", "true")),
    )


def _verification(value: str) -> bool | str:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    return words.get(value.lower(), value)


def _at(tree: Mapping[str, Any], path: str) -> Any:
    value: Any = tree
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _read_config(path: Path, *, needed: bool) -> Mapping[str, Any]:
    """Return the content of the HOCON file; empty without a file, or if not `needed` and no parser is installed."""
    if not path.is_file():
        return {}
    try:
        from clearml.utilities.pyhocon import (
            ConfigFactory,
        )  # slow to import, and the only reader of that format

        return dict(ConfigFactory.parse_string(path.read_text(encoding="utf-8")).as_plain_ordered_dict())
    except ImportError:
        if not needed:
            return {}
        raise UsageError(f"{path}: needs the package clearml to be read; install requirements.txt") from None
    except Exception as error:  # the parser raises the exceptions of its own parser
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path}: not readable ({first[:200]}); run clearml-init again") from None
