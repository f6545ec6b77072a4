#!/bin/sh
# Run the trainer as the owner of the mounted runs folder, without capabilities, and never as root.
#
# `docker run -v ~/gbr/runs:/usr/src/app/runs IMAGE python train.py ...` says nothing about users: the container
# starts as root, and what it writes has to belong to whoever owns that folder on the host. So this script becomes
# that owner and keeps nothing (but see below). A folder of root's, which Docker makes where there is none, is handed over first: a
# program that root leaves there with mode 4755 would make every user of the host root. With `docker run --user` (what
# the launcher does) there is nothing to change.
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

# It says what is wrong itself: a file system without owners, the root of a rootless engine.
answer="$(python -I -S -B /usr/src/app/starling/core/handover.py "$runs")"
# shellcheck disable=SC2086 # UID GID REACH
set -- $answer "$@"
uid="$1" gid="$2" reach="$3"
shift 3
if [ "$reach" = closed ]; then
    # A folder of root's is mounted that is closed to others, such as `-v ~:/home/user` by root. Of root's powers the
    # trainer keeps the one that reads there, and may write below runs/ and in temporary folders only.
    exec setpriv --reuid "$uid" --regid "$gid" --clear-groups --no-new-privs --inh-caps=-all,+dac_override \
        --ambient-caps=-all,+dac_override --bounding-set=-all,+dac_override \
        python -I -S -B /usr/src/app/starling/core/confine.py "$runs" "$@"
fi
exec setpriv --reuid "$uid" --regid "$gid" --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all "$@"
