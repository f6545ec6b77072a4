#!/bin/sh
# Run the ClearML agent, or say once which settings it lacks and wait: ending would only make Docker start it again.
set -eu

# Compose passes an unset variable as an empty one, which the agent would take for a value.
missing=""
for name in CLEARML_API_HOST CLEARML_API_ACCESS_KEY CLEARML_API_SECRET_KEY; do
    eval "value=\${$name:-}"
    [ -n "$value" ] || missing="$missing $name"
done
for name in CLEARML_WEB_HOST CLEARML_FILES_HOST; do
    eval "value=\${$name:-}"
    [ -n "$value" ] || unset "$name"
done

if [ -n "$missing" ]; then
    echo "clearml-agent: not started; set$missing in .env (ClearML: Settings, Workspace, Create new credentials)," \
        "then run: docker compose up -d clearml-agent. Everything else works without it."
    exec sleep infinity
fi

# In an image made from the trainer's, tasks use the trainer's Python as it is.
trainer=/opt/venv/bin/python
if [ -x "$trainer" ]; then
    export CLEARML_AGENT_SKIP_PYTHON_ENV_INSTALL=1 CLEARML_AGENT_SKIP_PIP_VENV_INSTALL="$trainer"
fi

echo "clearml-agent: queue ${CLEARML_QUEUE:-default} at $CLEARML_API_HOST"
# shellcheck disable=SC2086 # the device option is two words
exec /opt/agent/bin/clearml-agent daemon --foreground --queue "${CLEARML_QUEUE:-default}" --create-queue \
    ${CLEARML_AGENT_DEVICES:---cpu-only}
