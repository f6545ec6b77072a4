"""Exit 0 if the MLflow server answers a trainer from its database; `/health` also succeeds without the database."""

import base64
import http.client
import os
import sys
from pathlib import Path

DEFAULT_EXPERIMENT = "/api/2.0/mlflow/experiments/get?experiment_id=0"


def main() -> int:
    """Request the default experiment, which every database has, with a trainer's Host header and login."""
    headers = {"Host": "mlflow:5000"}
    try:
        if os.environ.get("MLFLOW_LOGIN") != "off":
            password = Path(os.environ["MLFLOW_TRAINER_PASSWORD_FILE"]).read_text().strip()
            headers["Authorization"] = "Basic " + base64.b64encode(f"trainer:{password}".encode()).decode()
        connection = http.client.HTTPConnection("127.0.0.1", 5000, timeout=4)
        connection.request("GET", DEFAULT_EXPERIMENT, headers=headers)
        answer = connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        print(error, file=sys.stderr)
        return 1
    if answer.status != 200:
        print(answer.status, answer.reason, file=sys.stderr)
    return int(answer.status != 200)


if __name__ == "__main__":
    sys.exit(main())
