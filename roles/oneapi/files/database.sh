# shellcheck shell=bash
# Runs in MariaDB's container as root, who needs no password on its socket. Says whether user, password and database are what they should be;
# with APPLY=yes it makes them so. A password comes out of the environment and goes over standard input.
set -u
root() { mariadb --protocol=socket --user=root --batch --skip-column-names; }
log_in() { MYSQL_PWD=$PASSWORD mariadb --protocol=tcp --host=127.0.0.1 --user="$NAME" --batch --skip-column-names --execute='SELECT 1' "$DATABASE" >/dev/null 2>&1; }

echo 'SELECT 1;' | root >/dev/null || exit 1
if log_in; then
  echo login=yes
  exit 0
fi
echo login=no
[ "$APPLY" = yes ] || exit 0
root <<SQL || exit 1
SET SESSION sql_log_bin = 0;
CREATE DATABASE IF NOT EXISTS \`$DATABASE\` CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci;
CREATE USER IF NOT EXISTS '$NAME'@'%';
ALTER USER '$NAME'@'%' IDENTIFIED BY '$PASSWORD';
GRANT ALL PRIVILEGES ON \`$DATABASE\`.* TO '$NAME'@'%';
SQL
log_in || exit 1
echo changed=yes
