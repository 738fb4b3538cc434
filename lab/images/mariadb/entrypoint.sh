#!/usr/bin/env bash
# What the official mariadb image's entrypoint is documented to do, as far as the roles rely on it.
set -euo pipefail
[ "${1:0:1}" = - ] && set -- mariadbd "$@"
case $1 in mariadbd | mysqld) ;; *) exec "$@" ;; esac
data=/var/lib/mysql

if [ "$(id -u)" = 0 ]; then
  find "$data" /run/mysqld ! -user mysql -exec chown mysql '{}' +
  exec setpriv --reuid=mysql --regid=mysql --init-groups "$0" "$@"
fi

# MARIADB_x or MYSQL_x, itself or by its _FILE, one of them.
from_env() {
  local name=$1 found='' word file
  for word in "MARIADB_$name" "MYSQL_$name"; do
    file=${word}_FILE
    if [ -n "${!word:-}" ] && [ -n "${!file:-}" ]; then
      echo "[ERROR] Both $word and $file are set (but are exclusive)" >&2
      exit 1
    fi
    [ -n "$found" ] || found=${!word:-}
    [ -n "$found" ] || [ -z "${!file:-}" ] || found=$(<"${!file}")
    unset "$word" "$file"
  done
  printf -v "$name" %s "$found"
}
for word in ROOT_PASSWORD ROOT_HOST DATABASE USER PASSWORD RANDOM_ROOT_PASSWORD ALLOW_EMPTY_ROOT_PASSWORD; do
  from_env "$word"
done

# A text as SQL has it.
quoted() {
  local text=${1//\\/\\\\}
  printf "'%s'" "${text//\'/\\\'}"
}

if [ ! -d "$data/mysql" ]; then
  if [ -z "$ROOT_PASSWORD" ] && [ -n "$RANDOM_ROOT_PASSWORD" ]; then
    ROOT_PASSWORD=$(tr -dc A-Za-z0-9 </dev/urandom | head -c 32 || true)
    echo "[Note] GENERATED ROOT PASSWORD: $ROOT_PASSWORD"
  elif [ -z "$ROOT_PASSWORD$ALLOW_EMPTY_ROOT_PASSWORD" ]; then
    echo '[ERROR] Database is uninitialized and password option is not specified' >&2
    exit 1
  fi
  echo '[Note] Initializing database files'
  mariadb-install-db --datadir="$data" --auth-root-authentication-method=normal --skip-test-db --skip-name-resolve >/dev/null
  # A server that nobody reaches but this script; it has the tables of the privileges, unlike --bootstrap.
  "$@" --skip-networking --socket=/run/mysqld/init.sock &
  pid=$!
  client=(mariadb --protocol=socket --socket=/run/mysqld/init.sock -uroot)
  for _try in $(seq 300); do
    "${client[@]}" -e 'SELECT 1' >/dev/null 2>&1 && break
    kill -0 "$pid"
    sleep 0.1
  done
  {
    [ -z "$DATABASE" ] || echo "CREATE DATABASE IF NOT EXISTS \`$DATABASE\`;"
    if [ -n "$USER" ] && [ -n "$PASSWORD" ]; then
      echo "CREATE USER $(quoted "$USER")@'%' IDENTIFIED BY $(quoted "$PASSWORD");"
      [ -z "$DATABASE" ] || echo "GRANT ALL ON \`${DATABASE//_/\\_}\`.* TO $(quoted "$USER")@'%';"
    fi
    echo "CREATE USER 'root'@$(quoted "${ROOT_HOST:-%}") IDENTIFIED BY $(quoted "$ROOT_PASSWORD");"
    echo "GRANT ALL ON *.* TO 'root'@$(quoted "${ROOT_HOST:-%}") WITH GRANT OPTION;"
    echo "SET PASSWORD FOR root@localhost = PASSWORD($(quoted "$ROOT_PASSWORD"));"
  } | "${client[@]}"
  client+=("-p$ROOT_PASSWORD")
  for file in /docker-entrypoint-initdb.d/*; do
    case $file in
      *.sh)
        # shellcheck source=/dev/null
        . "$file"
        ;;
      *.sql) "${client[@]}" ${DATABASE:+"$DATABASE"} <"$file" ;;
    esac
  done
  kill "$pid"
  wait "$pid" || true
  echo '[Note] MariaDB init process done. Ready for start up.'
fi
unset ROOT_PASSWORD PASSWORD
exec "$@"
