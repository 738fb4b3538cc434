#!/usr/bin/env bash
# ansible-test wants to stand in …/ansible_collections/selfhosted/fastgpt. It gets what the tarball holds, as Galaxy does; what only a checkout has,
# such as tests and bench, is read by ruff, and the lab by mypy as well.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
copy=$root/.cache/sanity/ansible_collections/selfhosted/fastgpt
rm -rf "$root/.cache/sanity" && mkdir -p "$copy"
.venv/bin/ansible-galaxy collection build --output-path "$root/.cache/sanity" >/dev/null
tar -xzf "$root"/.cache/sanity/*.tar.gz -C "$copy"
cd "$copy"
git init -q
echo /tests/output/ >.git/info/exclude
git add -A
# ansible-test downloads pip's bootstrap from a host of its own; the interpreter's ensurepip does the same offline
mkdir -p ~/.ansible/test/cache
for version in 24_2 25_2; do cp "$root/tests/support/get_pip.py" ~/.ansible/test/cache/get_pip_$version.py; done
python=$("$root/.venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
export PATH="$root/.venv/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ansible-test sanity "$@" --venv --python "$python" --color no
echo "ansible-test sanity: passed"
