#!/usr/bin/env bash
# Types of the plugins, under their real name, and of the lab.
set -euo pipefail
cd "$(dirname "$0")/.."
export MYPYPATH=.collections
mapfile -t plugins < <(git ls-files --cached --others --exclude-standard 'plugins/*.py' | sed 's#^#.collections/ansible_collections/selfhosted/fastgpt/#')
.venv/bin/mypy --config-file mypy.ini --namespace-packages --explicit-package-bases "${plugins[@]}"
MYPYPATH=lab .venv/bin/mypy --config-file mypy.ini --explicit-package-bases lab/sflab lab/lab.py lab/demo.py
