#!/bin/sh
# Run the trainer as the owner of the mounted runs folder, without capabilities.
#
# `docker run -v ~/gbr/runs:/usr/src/app/runs IMAGE python train.py ...` says nothing about users: the container
# starts as root, and what it writes has to belong to whoever owns that folder on the host. So this script becomes
# that owner and keeps nothing. With `docker run --user` (what the launcher does) there is nothing to change.
set -eu

runs="${STARLING_RUNS:-/usr/src/app/runs}"

if [ "$(id -u)" -ne 0 ] || grep -q '^CapEff:[[:space:]]*0*$' /proc/self/status; then
    exec "$@"
fi

uid="$(stat -c %u "$runs")"
gid="$(stat -c %g "$runs")"
if [ "$uid" -ne 0 ]; then
    exec setpriv --reuid "$uid" --regid "$gid" --clear-groups --no-new-privs \
        --inh-caps=-all --bounding-set=-all "$@"
fi

# Docker creates a missing mount source as root. Only root can write there; of root's powers it keeps the one that
# reads a home folder closed to others.
echo "starling: $runs belongs to root, so the results will too; chown it to work as another user" >&2
exec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all,+dac_override "$@"
