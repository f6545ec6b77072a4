#!/bin/sh
# Run the ClearML agent. If settings are missing, name them once and wait: Docker would restart an ended container.
set -eu

# Compose passes an unset variable as an empty one, which the agent would use as a value.
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

# In an image made from the trainer's image, tasks use the trainer's Python.
trainer="${CLEARML_AGENT_PYTHON:-/opt/venv/bin/python}"
if [ -x "$trainer" ]; then
    export CLEARML_AGENT_SKIP_PYTHON_ENV_INSTALL=1 CLEARML_AGENT_SKIP_PIP_VENV_INSTALL="$trainer"
    python="$trainer"
else
    python="an environment made for each task"
fi

# agent DEVICE_OPTION...: replace this process with one agent.
agent() {
    exec /opt/agent/bin/clearml-agent daemon --foreground --queue "${CLEARML_QUEUE:-default}" --create-queue "$@"
}

devices="${CLEARML_AGENT_DEVICES:---cpu-only}"
if [ "$devices" != each ]; then
    echo "clearml-agent: queue ${CLEARML_QUEUE:-default} at $CLEARML_API_HOST, one agent ($devices); tasks use $python"
    # shellcheck disable=SC2086 # the device option is two words
    agent $devices
fi

gpus="$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true)"
if [ -z "$gpus" ]; then
    echo "clearml-agent: not started; CLEARML_AGENT_DEVICES=each, and this container sees no GPU: start it with" \
        "docker compose -f docker-compose.yml -f deploy/compose.gpu.yml up -d clearml-agent"
    exec sleep infinity
fi
echo "clearml-agent: queue ${CLEARML_QUEUE:-default} at $CLEARML_API_HOST, one agent a GPU ($(echo "$gpus" | tr '\n' ' ' | sed 's/ $//')); tasks use $python"
agents=""
for gpu in $gpus; do
    agent --gpus "$gpu" &
    agents="$agents $!"
done
# A stop signal ends all agents. If one agent dies, the others end too, and Docker restarts the container.
# shellcheck disable=SC2086 # several process numbers
trap 'kill $agents 2>/dev/null; wait; exit 143' TERM INT
while true; do
    for process in $agents; do
        if ! kill -0 "$process" 2>/dev/null; then
            echo "clearml-agent: an agent has ended; starting all again" >&2
            # shellcheck disable=SC2086
            kill $agents 2>/dev/null || true
            wait
            exit 1
        fi
    done
    sleep 2 &
    wait $!
done
