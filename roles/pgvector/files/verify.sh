# shellcheck shell=bash
# Runs in the container. One line of JSON for each check.
set -u
ask() { psql -XAtqw -v ON_ERROR_STOP=1 -U "$SUPERUSER" -v user="$APP_USER" -v database="$APP_DATABASE" -d "$1" 2>&1; }
log_in() { PGCONNECT_TIMEOUT=10 PGPASSWORD=$2 psql -XAtqw -h 127.0.0.1 -U "$1" -d "$APP_DATABASE" -c "${3:-SELECT 1}" 2>&1; }
now() { printf %s "${EPOCHREALTIME/[^0-9]/.}"; }
started=$(now)
say() {
  local ok=false detail
  [ "$2" = ok ] && ok=true
  detail=$(tr -s '[:cntrl:]' ' ' <<<"$3" | sed -e 's/[\\"]/\\&/g' -e 's/ *$//')
  printf '{"name": "%s", "ok": %s, "seconds": %s, "detail": "%s"}\n' "$1" "$ok" "$(awk -v a="$started" -v b="$(now)" 'BEGIN { printf "%.3f", b - a }')" "$detail"
  started=$(now)
}
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

if answer=$(ask postgres <<<"SHOW server_version"); then
  say "pgvector answers" ok "PostgreSQL ${answer%% *}"
else
  say "pgvector answers" red "$answer. See docker logs $CONTAINER on the host, then run site.yml."
  exit 0
fi

answer=$(ask "$APP_DATABASE" <<<"SELECT extversion FROM pg_extension WHERE extname = 'vector'") || answer="unknown ($answer)"
if [[ $answer =~ ^[0-9.]+$ ]] && at_least "$answer" "$MINIMUM_EXTENSION"; then
  say "pgvector extension" ok "vector $answer"
else
  say "pgvector extension" red "vector is ${answer:-missing} in $APP_DATABASE, at least $MINIMUM_EXTENSION is needed. Run site.yml with a newer pgvector_image."
fi

if answer=$(log_in "$APP_USER" "$APP_PASSWORD"); then
  say "pgvector user logs in" ok "$APP_USER into $APP_DATABASE"
else
  say "pgvector user logs in" red "$answer. Run site.yml, which sets the password of the inventory."
fi

if answer=$(log_in "$APP_USER" "not-$RANDOM$RANDOM$RANDOM"); then
  say "pgvector refuses a wrong password" red "a wrong password was let in. Run site.yml, which writes pg_hba.conf, and see that nothing else replaces it."
elif [[ $answer == *"password authentication failed"* ]]; then
  say "pgvector refuses a wrong password" ok "refused"
else
  say "pgvector refuses a wrong password" red "$answer"
fi

if answer=$(log_in "$SUPERUSER" "$SUPERUSER_PASSWORD"); then
  say "pgvector refuses its superuser on the network" red "it was let in. Run site.yml, which writes pg_hba.conf."
elif [[ $answer == *"pg_hba.conf rejects"* ]]; then
  say "pgvector refuses its superuser on the network" ok "refused"
else
  say "pgvector refuses its superuser on the network" red "$answer"
fi

# FastGPT makes its table and the index at its first request that touches them.
answer=$(ask "$APP_DATABASE" <<'SQL'
SELECT CASE
  WHEN to_regclass('public.modeldata') IS NULL THEN 'not yet'
  ELSE coalesce((SELECT string_agg(x.relname || CASE WHEN i.indisvalid THEN '' ELSE ' (invalid)' END, ', ')
                 FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_am a ON a.oid = x.relam
                 WHERE i.indrelid = to_regclass('public.modeldata') AND a.amname = 'hnsw'), 'missing') END;
SQL
) || answer="unknown: $answer"
case $answer in
  "not yet") say "pgvector index" ok "not yet: FastGPT makes its table at its first request" ;;
  missing) say "pgvector index" red "modeldata has no HNSW index, so each search reads all vectors. Restart FastGPT, which makes it: docker restart fastgpt" ;;
  *invalid*) say "pgvector index" red "$answer: a build was broken off. Rebuild it: REINDEX INDEX CONCURRENTLY vector_index" ;;
  unknown*) say "pgvector index" red "$answer" ;;
  *) say "pgvector index" ok "$answer" ;;
esac
