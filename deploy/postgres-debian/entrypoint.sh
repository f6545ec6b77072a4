#!/bin/sh
# Initialise the cluster on the first start, then run the server: POSTGRES_USER, POSTGRES_DB, POSTGRES_PASSWORD_FILE.
set -eu

if [ "$(id -u)" -eq 0 ]; then
    install -d -o postgres -g postgres -m 0700 "$PGDATA"
    exec setpriv --reuid postgres --regid postgres --init-groups "$0" "$@"
fi

user="${POSTGRES_USER:-postgres}"
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    initdb --username="$user" --pwfile="$POSTGRES_PASSWORD_FILE" --auth-local=trust --auth-host=scram-sha-256 >/dev/null
    echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
    # Create the database through the local socket, before the server listens on the network.
    if [ "${POSTGRES_DB:-postgres}" != postgres ]; then
        pg_ctl --silent --wait --options="-c listen_addresses=''" start >/dev/null
        createdb --username="$user" "$POSTGRES_DB"
        pg_ctl --silent --wait stop >/dev/null
    fi
fi
exec "$@" -c listen_addresses='*'
