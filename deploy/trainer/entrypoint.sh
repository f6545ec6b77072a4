#!/bin/sh
# Run the trainer as the owner of the mounted runs folder, without capabilities, and never as root.
#
# `docker run -v ~/gbr/runs:/usr/src/app/runs IMAGE python train.py ...` names no user: the container starts as root,
# but the files that it writes must belong to the owner of that folder on the host. This script therefore switches to
# that owner and drops all capabilities (with one exception below). If root owns the folder, as after Docker has made
# it, the folder is handed over first: a program of root's there with mode 4755 would make every user of the host root.
# With `docker run --user` (as the launcher does) there is nothing to change.
set -eu

runs="${STARLING_RUNS:-/usr/src/app/runs}"

if [ "$(id -u)" -ne 0 ]; then
    exec "$@"
fi
if grep -q '^CapEff:[[:space:]]*0*$' /proc/self/status; then
    echo "starling: this container is root and has no capability to become another user, and no trainer runs as" \
        "root; give it a user: docker run --user UID:GID" >&2
    exit 2
fi

# handover.py reports problems itself: a file system without owners, the root of a rootless engine.
answer="$(python -I -S -B /usr/src/app/starling/core/handover.py "$runs")"
# shellcheck disable=SC2086 # UID GID REACH
set -- $answer "$@"
uid="$1" gid="$2" reach="$3"
shift 3
if [ "$reach" = closed ]; then
    # A mounted folder of root's is closed to other users, such as `-v ~:/home/user` by root. The trainer keeps the one
    # capability that reads there, and may write only below runs/ and in temporary folders.
    exec setpriv --reuid "$uid" --regid "$gid" --clear-groups --no-new-privs --inh-caps=-all,+dac_override \
        --ambient-caps=-all,+dac_override --bounding-set=-all,+dac_override \
        python -I -S -B /usr/src/app/starling/core/confine.py "$runs" "$@"
fi
exec setpriv --reuid "$uid" --regid "$gid" --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all "$@"
