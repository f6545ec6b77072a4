"""Start the MLflow server of `docker compose`: PostgreSQL behind it, artifacts through it, nothing extra.

The database's address comes from DATABASE_HOST, DATABASE_NAME, DATABASE_USER and the file that
DATABASE_PASSWORD_FILE names, so that no password stands in an argument or in `docker inspect`.
"""

import os
from pathlib import Path
from urllib.parse import quote

ALLOWED_HOSTS = "mlflow:5000,mlflow,localhost:*,127.0.0.1:*"
ARTIFACTS = "/mlflow/artifacts"


def database_uri() -> str:
    """Return the SQLAlchemy address of the database, with user and password escaped."""
    password = Path(os.environ["DATABASE_PASSWORD_FILE"]).read_text().strip()
    user = quote(os.environ["DATABASE_USER"], safe="")
    host, name = os.environ["DATABASE_HOST"], os.environ["DATABASE_NAME"]
    # The driver stands in the address: SQLAlchemy 2.1 takes another one by default.
    return f"postgresql+psycopg2://{user}:{quote(password, safe='')}@{host}/{name}"


def main() -> None:
    """Become the server process, so that a stop signal reaches it."""
    extra_hosts = os.environ.get("MLFLOW_EXTRA_ALLOWED_HOSTS", "").strip(", ")
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": database_uri(),
        # Job execution starts a dozen helper processes that a tracking server has no use for.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [
        "mlflow", "server", "--host", "0.0.0.0", "--port", "5000",
        "--workers", os.environ.get("MLFLOW_WORKERS") or "1",
        "--serve-artifacts", "--artifacts-destination", os.environ.get("MLFLOW_ARTIFACTS") or ARTIFACTS,
        "--allowed-hosts", ",".join(filter(None, [ALLOWED_HOSTS, extra_hosts])),
    ]  # fmt: skip
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    main()
