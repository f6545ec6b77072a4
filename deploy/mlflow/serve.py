"""Start the MLflow server of `docker compose`, with PostgreSQL as its store, served artifacts, and a login.

The database's address comes from DATABASE_HOST, DATABASE_NAME and DATABASE_USER. Every secret comes from a file,
because arguments and variables are visible in `docker inspect`. Two users exist: `admin`, and `trainer`, who logs runs
and may not delete the runs of others. MLFLOW_LOGIN=off leaves the login out, for a server that only this machine can
reach.

If an older MLflow made the database's tables, the server waits, because the user should make a backup first;
`serve.py upgrade` upgrades the tables.
"""

import os
import shutil
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path
from urllib.parse import quote

ALLOWED_HOSTS = "mlflow:5000,mlflow,localhost:*,127.0.0.1:*"
ARTIFACTS = "/mlflow/artifacts"
AUTH_CONFIG = Path("/tmp/basic_auth.ini")
METRICS = Path("/tmp/metrics")
ADMIN, TRAINER = "admin", "trainer"
SCHEMA_POLL_S = 2.0
UPGRADE = "docker compose exec mlflow python /usr/local/lib/starling/serve.py upgrade"
LOOPBACK = {"127.0.0.1", "localhost", "::1", "[::1]"}


def secret(name: str) -> str:
    """Return the contents of the file that the variable NAME_FILE names."""
    return Path(os.environ[f"{name}_FILE"]).read_text().strip()


def database_uri() -> str:
    """Return the SQLAlchemy address of the database, with user and password escaped."""
    user = quote(os.environ["DATABASE_USER"], safe="")
    host, name = os.environ["DATABASE_HOST"], os.environ["DATABASE_NAME"]
    # Name the driver, because SQLAlchemy 2.1 uses another one by default.
    return f"postgresql+psycopg2://{user}:{quote(secret('DATABASE_PASSWORD'), safe='')}@{host}/{name}"


def login_wanted() -> bool:
    """Return whether users log in; ends the program if a server without login would be open to a network."""
    choice, bind = os.environ.get("MLFLOW_LOGIN") or "on", os.environ.get("MLFLOW_BIND") or "127.0.0.1"
    if choice not in ("on", "off"):
        sys.exit(f"MLFLOW_LOGIN={choice}: must be on or off")
    if choice == "off" and bind not in LOOPBACK:
        sys.exit(
            f"MLFLOW_LOGIN=off with MLFLOW_BIND={bind}: anyone there could write; leave out one of the two"
        )
    return choice == "on"


def prepare_login(environment: MutableMapping[str, str], uri: str) -> None:
    """Write the server's configuration, and set the passwords of both users from their files.

    MLflow itself reads the administrator's password only once, so a changed file would otherwise lock all users out.
    """
    # configparser treats % as the start of a reference, and the escaped password may contain %.
    AUTH_CONFIG.unlink(missing_ok=True)
    AUTH_CONFIG.touch(mode=0o600)
    AUTH_CONFIG.write_text(
        "[mlflow]\n"
        "default_permission = EDIT\n"
        f"database_uri = {uri.replace('%', '%%')}\n"
        f"admin_username = {ADMIN}\n"
        # Without this cache every request hashes the password again, which takes 160 ms.
        "auth_cache_ttl_seconds = 60\n"
    )
    environment["MLFLOW_AUTH_CONFIG_PATH"] = str(AUTH_CONFIG)
    environment["MLFLOW_FLASK_SERVER_SECRET_KEY"] = secret("MLFLOW_SECRET_KEY")

    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    users = SqlAlchemyStore()
    users.init_db(uri)
    for name, file in ((ADMIN, "MLFLOW_ADMIN_PASSWORD"), (TRAINER, "MLFLOW_TRAINER_PASSWORD")):
        password = secret(file)
        if not users.has_user(name):
            users.create_user(name, password, is_admin=name == ADMIN)
        elif not users.authenticate_user(name, password):
            users.update_user(name, password=password)


def schema_problem(uri: str) -> str:
    """Return why this MLflow cannot use the database's tables; empty if it can, or if there are no tables yet."""
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError
    from mlflow.store.db.utils import _get_alembic_config, create_sqlalchemy_engine

    engine = create_sqlalchemy_engine(uri)
    with engine.connect() as connection:
        stored = MigrationContext.configure(connection).get_current_revision()
    engine.dispose()
    ours = ScriptDirectory.from_config(_get_alembic_config(""))
    if stored in {None, ours.get_current_head()}:
        return ""
    versions = f"(version {stored}, not {ours.get_current_head()})"
    try:
        ours.get_revision(stored)
    except CommandError:
        return f"the database has the tables of a newer MLflow {versions}; build the image of that one, or restore a backup"
    return (
        f"the database has the tables of an older MLflow {versions}; back it up with: launcher track backup FILE\n"
        f"then upgrade it with: {UPGRADE}"
    )


def wait_for_schema(uri: str) -> None:
    """Wait until the tables fit this MLflow, and print the remedy once; MLflow would change them without a backup."""
    told = ""
    while problem := schema_problem(uri):
        if problem != told:
            print(f"{problem}\nwaiting for that", file=sys.stderr, flush=True)
            told = problem
        time.sleep(SCHEMA_POLL_S)


def upgrade(uri: str) -> None:
    """Upgrade the tables of an older MLflow; ends the program if a newer MLflow made them."""
    from mlflow.store.db.utils import _upgrade_db, create_sqlalchemy_engine

    problem = schema_problem(uri)
    if "a newer MLflow" in problem:
        sys.exit(problem)
    if problem:
        _upgrade_db(create_sqlalchemy_engine(uri))
    print("the tables fit this MLflow")


def main() -> None:
    """Run the server in this process, which passes stop signals on; a new process would repeat the slow imports."""
    with_login = login_wanted()
    uri = database_uri()
    if sys.argv[1:] == ["upgrade"]:
        upgrade(uri)
        return
    wait_for_schema(uri)
    # Job execution starts a dozen helper processes that a tracking server does not need.
    os.environ |= {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    if with_login:
        prepare_login(os.environ, uri)
    # Remove counters of processes before a restart, which would be added to the current ones.
    shutil.rmtree(METRICS, ignore_errors=True)
    extra_hosts = os.environ.get("MLFLOW_EXTRA_ALLOWED_HOSTS", "").strip(", ")

    from mlflow.cli import cli

    cli(
        [
            "server", "--host", "0.0.0.0", "--port", "5000",
            "--workers", os.environ.get("MLFLOW_WORKERS") or "1",
            "--serve-artifacts", "--artifacts-destination", os.environ.get("MLFLOW_ARTIFACTS") or ARTIFACTS,
            "--allowed-hosts", ",".join(filter(None, [ALLOWED_HOSTS, extra_hosts])),
            "--expose-prometheus", str(METRICS),
            # The health check alone sends 17,000 requests a day; the metrics count requests.
            "--uvicorn-opts", "--no-access-log",
            *(["--app-name", "basic-auth"] if with_login else []),
        ],
        prog_name="mlflow",
    )  # fmt: skip


if __name__ == "__main__":
    main()
