"""The address of a study in a database: `postgresql://user@host[:port]/database`, without secrets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from starling.core.errors import UsageError, suggest

SCHEMES = ("postgresql", "postgres")
PASSWORD_FILE_VARIABLE = "STARLING_STUDY_PASSWORD_FILE"
SSL_MODES = ("prefer", "disable", "require", "verify-full")
DEFAULT_PORT = 5432
_OPTIONS = ("sslmode", "sslrootcert")
_SHAPE = "postgresql://user@host[:port]/database"


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyUrl:
    """A database that holds studies. It contains no password, so messages may show it."""

    user: str
    host: str
    port: int = DEFAULT_PORT
    database: str
    sslmode: str = "prefer"
    """`prefer`: encrypted if the server can; `disable`; `require`; `verify-full`: also checks the certificate."""
    sslrootcert: str = ""
    """File with the certificate authorities for `verify-full`; empty: the system's."""

    def __str__(self) -> str:
        """Return the URL for messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"postgresql://{self.user}@{host}:{self.port}/{self.database}"


def parse_study_url(url: str) -> StudyUrl:
    """Return the database that `--study` names.

    Raises UsageError for anything but a PostgreSQL URL with user, host and database, and for a URL with a password; no
    message repeats a possible password.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in SCHEMES:
        # The message repeats only the scheme of another kind of URL, because the rest may hold a password.
        shown = f"{scheme}://…" if re.fullmatch(r"[\w+.-]+", scheme) and separator else "this"
        hint = suggest(scheme, SCHEMES) if separator else ""
        raise UsageError(
            f"--study: {shown} is no place for a study{hint}; give {_SHAPE}, or leave --study out for a journal in "
            "the search's folder"
        )
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        raise UsageError(f"--study: cannot be read as a URL; give {_SHAPE}") from None
    if parts.password is not None or any("pass" in name.lower() for name in options):
        raise UsageError(
            "--study: holds a password, which would appear in container labels, process lists and logs; take it out of "
            f"the URL, change it if it was real, and give it by {PASSWORD_FILE_VARIABLE}=FILE, PGPASSWORD or ~/.pgpass"
        )
    user, database = unquote(parts.username or ""), unquote(parts.path.removeprefix("/"))
    missing = [name for name, value in (("user", user), ("host", host), ("database", database)) if not value]
    if missing or "/" in database or parts.fragment or not (user + database).isprintable():
        what = f"lacks {' and '.join(missing)}" if missing else "cannot be read"
        raise UsageError(f"--study: {what}; give {_SHAPE}")
    return StudyUrl(
        user=user, host=str(host), port=port or DEFAULT_PORT, database=database, **_ssl_options(options)
    )


def _ssl_options(options: dict[str, str]) -> dict[str, str]:
    """Return the checked options after the `?`; raises UsageError."""
    for name in options:
        if name not in _OPTIONS:
            raise UsageError(
                f"--study: unknown option {name!r}{suggest(name, _OPTIONS)}; known: {', '.join(_OPTIONS)}"
            )
    mode = options.get("sslmode", "prefer")
    if mode not in SSL_MODES:
        raise UsageError(
            f"--study: sslmode={mode}{suggest(mode, SSL_MODES)}; must be one of: {', '.join(SSL_MODES)}"
        )
    if options.get("sslrootcert") and mode != "verify-full":
        raise UsageError("--study: sslrootcert is only used with sslmode=verify-full; give both")
    return options
