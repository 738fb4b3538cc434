#!/usr/bin/env bash
# ansible-test wants to stand in …/ansible_collections/selfhosted/fastgpt and to see tracked files only, so it gets a copy.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
copy=$root/.cache/sanity/ansible_collections/selfhosted/fastgpt
rm -rf "$copy" && mkdir -p "$copy"
# the cluster of the lab has the lab's variables by a link to their directory, since the vault file among them is not in git
git ls-files -z --cached --others --exclude-standard -- . ':!.collections' ':!inventories/lab-cluster/group_vars' |
  while IFS= read -r -d '' file; do if [ -e "$file" ]; then printf '%s\0' "$file"; fi; done |
  xargs -0 cp --parents -P -t "$copy"
cd "$copy"
git init -q && git add -A
# ansible-test downloads pip's bootstrap from a host of its own; the interpreter's ensurepip does the same offline
mkdir -p ~/.ansible/test/cache
for version in 24_2 25_2; do cp "$root/tests/support/get_pip.py" ~/.ansible/test/cache/get_pip_$version.py; done
python=$("$root/.venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
export PATH="$root/.venv/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ansible-test sanity "$@" --venv --python "$python" --color no
echo "ansible-test sanity: passed"
