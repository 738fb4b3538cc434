#!/usr/bin/env bash
# What the official mongo image's entrypoint is documented to do, as far as the roles rely on it.
set -euo pipefail
[ "${1:0:1}" = - ] && set -- mongod "$@"
[ "$1" = mongod ] || exec "$@"

if [ "$(id -u)" = 0 ]; then
  find /data/db /data/configdb ! -user mongodb -exec chown mongodb '{}' +
  exec setpriv --reuid=mongodb --regid=mongodb --init-groups "$0" "$@"
fi

# VAR or VAR_FILE, not both.
from_file() {
  local var=$1 file=${1}_FILE
  if [ -n "${!var:-}" ] && [ -n "${!file:-}" ]; then
    echo "error: both $var and $file are set (but are exclusive)" >&2
    exit 1
  fi
  if [ -n "${!file:-}" ]; then
    export "$var"="$(<"${!file}")"
  fi
  unset "$file"
}
from_file MONGO_INITDB_ROOT_USERNAME
from_file MONGO_INITDB_ROOT_PASSWORD
user=${MONGO_INITDB_ROOT_USERNAME:-} password=${MONGO_INITDB_ROOT_PASSWORD:-}
if [ -n "$user$password" ] && { [ -z "$user" ] || [ -z "$password" ]; }; then
  echo 'error: missing MONGO_INITDB_ROOT_USERNAME or MONGO_INITDB_ROOT_PASSWORD; both must be specified' >&2
  exit 1
fi

if [ -n "$user" ]; then
  if [ ! -e /data/db/WiredTiger ] && [ ! -e /data/db/storage.bson ]; then
    # First start: no access control, no replica set, loopback only, to create the root user.
    mongod --dbpath /data/db --bind_ip 127.0.0.1 --port 27017 &
    pid=$!
    python3 - <<'PY'
import os
import pymongo
client = pymongo.MongoClient("127.0.0.1", 27017, directConnection=True, serverSelectionTimeoutMS=60000)
client.admin.command("createUser", os.environ["MONGO_INITDB_ROOT_USERNAME"],
                     pwd=os.environ["MONGO_INITDB_ROOT_PASSWORD"], roles=[{"role": "root", "db": "admin"}])
PY
    kill "$pid"
    wait "$pid" || true
  fi
  case " $* " in
    *" --auth "* | *" --keyFile "* | *" --keyFile="*) ;;
    *) set -- "$@" --auth ;;
  esac
fi
unset MONGO_INITDB_ROOT_USERNAME MONGO_INITDB_ROOT_PASSWORD
case " $* " in
  *" --bind_ip"* | *" --config "* | *" -f "*) ;;
  *) set -- "$@" --bind_ip_all ;;
esac
exec "$@"
