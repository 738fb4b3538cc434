#!/usr/bin/env bash
# Documentation of modules, filters and roles, as the docs site would refuse it.
set -euo pipefail
cd "$(dirname "$0")/.."
export ANSIBLE_COLLECTIONS_PATH=$PWD/.collections
# antsibull-docs calls ansible-galaxy and ansible-doc
export PATH=$PWD/.venv/bin:$PATH
.venv/bin/antsibull-docs lint-collection-docs --plugin-docs --skip-rstcheck .
.venv/bin/python tests/lint_argument_specs.py
.venv/bin/python docs/role_readmes.py --check
.venv/bin/python docs/model_table.py --check
.venv/bin/python docs/reliability_table.py --check
.venv/bin/python docs/gpu_hosts_table.py --check
