#!/usr/bin/env bash
# Tests with the real packages of the engines: tests/engines/run.sh [name...], all of them without a name.
# Their environments are made as the role makes them, from its locks, and kept in .cache/engines.
# torch is fetched by pip, which knows best where this machine's packages come from.
set -euo pipefail
cd "$(dirname "$0")/../.."
role=roles/model_server
names=("$@")
if [ ${#names[@]} -eq 0 ]; then
  for directory in tests/engines/*/; do names+=("$(basename "$directory")"); done
fi
default() { sed -n "s/^$1: *//p" $role/defaults/main.yml; }
for name in "${names[@]}"; do
  lock=$role/files/requirements/$name.txt
  torch=
  if [ "$name" != hub ]; then torch=$(default model_server_torch_version); fi
  ENGINE_DIR=$PWD/.cache/engines/$name-$({ cat "$lock"; printf %s "$torch"; } | sha256sum | cut -c1-12)
  export ENGINE_DIR
  mkdir -p .cache/engines
  if [ ! -e "$ENGINE_DIR/.complete" ]; then
    echo "=== environment of $name"
    wheels=
    if [ -n "$torch" ]; then
      wheels=$PWD/.cache/engines/wheels
      .venv/bin/python -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: -d "$wheels" "torch==$torch"
    fi
    .venv/bin/python - "$name" "$lock" "$torch" "$(default model_server_uv_version)" "$wheels" <<'PYTHON' | MODEL_SERVER_RUN="$PWD/.cache/engines/run" python3 $role/files/prepare.py
import json, os, sys
name, lock, torch, uv, wheels = sys.argv[1:]
engine = {"name": name, "dir": os.environ["ENGINE_DIR"], "lock": os.path.abspath(lock), "torch": torch}
packages = {"index_url": os.environ.get("PIP_INDEX_URL", ""), "find_links": wheels}
python = os.path.realpath(sys.executable)
print(json.dumps({"python": python, "uv_version": uv, "engines_dir": os.path.dirname(engine["dir"]), "packages": packages, "engines": [engine], "weights": []}))
PYTHON
  fi
  echo "=== tests with $name"
  python=.venv/bin/python more='' workers=(-n 2)
  if [ -e "tests/engines/$name/requirements.txt" ]; then  # these run inside the engine, with what they need beside it
    python=$ENGINE_DIR/bin/python more=$ENGINE_DIR-tests workers=()
    [ -e "$more" ] || .venv/bin/uv pip install --quiet --python "$python" --target "$more" -r "tests/engines/$name/requirements.txt"
  fi
  PYTHONPATH=$more "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" "tests/engines/$name"
done
