# shellcheck shell=bash
# Runs in the container. Says what stands, as name=value lines, and changes nothing.
set -u
ask() { psql -XAtqw -v ON_ERROR_STOP=1 -U "$SUPERUSER" -v user="$APP_USER" -v database="$APP_DATABASE" -d "$1"; }

role=$(ask postgres <<<"SELECT count(*) FROM pg_roles WHERE rolname = :'user' AND rolcanlogin") || exit 1
owner=$(ask postgres <<<"SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = :'database'") || exit 1
available=$(ask postgres <<<"SELECT default_version FROM pg_available_extensions WHERE name = 'vector'") || exit 1
extension=
if [ -n "$owner" ]; then
  extension=$(ask "$APP_DATABASE" <<<"SELECT extversion FROM pg_extension WHERE extname = 'vector'") || exit 1
fi
login=no
if PGPASSWORD=$APP_PASSWORD psql -XAtqw -h 127.0.0.1 -U "$APP_USER" -d "$APP_DATABASE" -c 'SELECT 1' >/dev/null 2>&1; then
  login=yes
fi
printf 'role=%s\nowner=%s\nextension=%s\navailable=%s\nlogin=%s\n' "$role" "$owner" "$extension" "$available" "$login"
