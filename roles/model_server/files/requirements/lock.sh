#!/bin/sh
# Writes the .txt locks from the .in files (of the engines named, else of all): Linux, CPython 3.11 to 3.13, x86_64 and aarch64,
# wheels only, every file by hash.
# Needs uv (model_server_uv_version) on PATH and a package index. No index address may end up in a lock.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$here"/*.in "$here/overrides.txt" "$work"
cat > "$work/pyproject.toml" <<'TOML'
[project]
name = "lock"
version = "0"
requires-python = ">=3.11,<3.14"
[tool.uv]
environments = [
  "sys_platform == 'linux' and implementation_name == 'cpython' and platform_machine == 'x86_64'",
  "sys_platform == 'linux' and implementation_name == 'cpython' and platform_machine == 'aarch64'",
]
TOML
cd "$work"
[ $# -gt 0 ] || set -- infinity transformers legacy_chat hub
for name in "$@"; do
  cp overrides.txt overrides-now.txt
  case $name in transformers | legacy_chat) grep -v '^numpy' overrides.txt > overrides-now.txt ;; esac
  uv pip compile --quiet --universal --python-version 3.11 --only-binary :all: --generate-hashes --no-header --no-annotate \
    --no-emit-index-url --no-emit-find-links --override overrides-now.txt "$name.in" --output-file "$name.lock"
  # Linux, CPython and the machine are given; of the markers only the Python version says something.
  { echo "# Written by lock.sh from $name.in; do not edit."
    sed -E "/==/{s/ ; (python_full_version [<>=]+ '[0-9.]+').*( \\\\)$/ ; \1\2/;t;s/ ; .*( \\\\)$/\1/}" "$name.lock"; } > "$here/$name.txt"
done
