#!/usr/bin/env bash
# What the official postgres image's entrypoint is documented to do, as far as the roles rely on it.
set -euo pipefail
[ "${1:0:1}" = - ] && set -- postgres "$@"
[ "$1" = postgres ] || exec "$@"

if [ "$(id -u)" = 0 ]; then
  mkdir -p "$PGDATA"
  chmod 700 "$PGDATA" || true
  find "$PGDATA" ! -user postgres -exec chown postgres '{}' +
  exec setpriv --reuid=postgres --regid=postgres --init-groups "$0" "$@"
fi

# VAR or VAR_FILE, not both; else the default.
from_file() {
  local var=$1 file=${1}_FILE default=${2:-} value
  if [ -n "${!var:-}" ] && [ -n "${!file:-}" ]; then
    echo "error: both $var and $file are set (but are exclusive)" >&2
    exit 1
  fi
  value=${!var:-$default}
  [ -z "${!file:-}" ] || value=$(<"${!file}")
  export "$var"="$value"
  unset "$file"
}
from_file POSTGRES_PASSWORD
from_file POSTGRES_USER postgres
from_file POSTGRES_DB "$POSTGRES_USER"
from_file POSTGRES_INITDB_ARGS

if [ ! -s "$PGDATA/PG_VERSION" ]; then
  if [ -z "$POSTGRES_PASSWORD" ] && [ "${POSTGRES_HOST_AUTH_METHOD:-}" != trust ]; then
    echo 'Error: Database is uninitialized and superuser password is not specified.' >&2
    exit 1
  fi
  # shellcheck disable=SC2086  # these are arguments
  initdb --username="$POSTGRES_USER" --pwfile=<(printf '%s\n' "$POSTGRES_PASSWORD") $POSTGRES_INITDB_ARGS
  printf '\nhost all all all %s\n' "${POSTGRES_HOST_AUTH_METHOD:-scram-sha-256}" >>"$PGDATA/pg_hba.conf"
  export PGUSER=$POSTGRES_USER PGPASSWORD=$POSTGRES_PASSWORD
  pg_ctl -w -o "-c listen_addresses='' -p 5432" start
  [ "$POSTGRES_DB" = postgres ] || createdb "$POSTGRES_DB"
  for file in /docker-entrypoint-initdb.d/*; do
    case $file in
      *.sh)
        # shellcheck source=/dev/null
        . "$file"
        ;;
      *.sql) psql -v ON_ERROR_STOP=1 --no-password --dbname "$POSTGRES_DB" -f "$file" ;;
    esac
  done
  pg_ctl -m fast -w stop
  unset PGUSER PGPASSWORD
  echo 'PostgreSQL init process complete; ready for start up.'
fi
unset POSTGRES_PASSWORD
case " $* " in
  *listen_addresses*) ;;
  *) set -- "$@" -c 'listen_addresses=*' ;;
esac
exec "$@"
