# shellcheck shell=bash
# Runs in the container. Makes the user, its password, its database and the extension what they should be; each step can be repeated.
set -eu
run() { psql -XAtqw -v ON_ERROR_STOP=1 -U "$SUPERUSER" -v user="$APP_USER" -v database="$APP_DATABASE" -d "$1"; }

# The password comes out of the environment, and no statement that holds it is written to the server's log.
run postgres <<'SQL'
SET log_statement = 'none';
SET log_min_error_statement = 'panic';
SET log_min_duration_statement = -1;
SET password_encryption = 'scram-sha-256';
\set password `printf %s "$APP_PASSWORD"`
SELECT format('CREATE ROLE %I', :'user') WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'user') \gexec
ALTER ROLE :"user" LOGIN PASSWORD :'password';
SELECT format('CREATE DATABASE %I OWNER %I', :'database', :'user')
  WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = :'database') \gexec
ALTER DATABASE :"database" OWNER TO :"user";
SQL

[ "$EXTENSION" = yes ] || exit 0
run "$APP_DATABASE" <<'SQL'
CREATE EXTENSION IF NOT EXISTS vector;
ALTER EXTENSION vector UPDATE;
SQL
