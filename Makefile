# Two commands: `make demo` deploys everything on lab hosts of this machine, `make test` passes the tests.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
FASTGPT_VERSION ?=
BIN := .venv/bin
# pyenv's shims and a colour-hungry terminal only confuse the tools below
export ANSIBLE_NOCOLOR ?=
# bytecode is kept, since every process of Ansible loads the plugins anew, but beside the tree
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/.cache/pycache

.PHONY: help demo demo-down lab-clean test test-beside test-all lint sanity unit explore integration door-role engines playbooks molecule molecule-cluster molecule-gpu molecule-gpu-dkms bench-modules bench-door bench-models bench-gpu bench-site killed-runs clean

help: ## this text
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

.venv/.done: requirements-dev.txt lab/packages.txt
	@echo "=== Debian packages and .venv"
	missing=$$(grep -v '^#' lab/packages.txt | xargs -I{} sh -c "dpkg-query -W -f '\$${db:Status-Status}' {} 2>/dev/null | grep -q '^installed' || echo {}")
	if [ -n "$$missing" ]; then
	  apt-get update -q
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $$missing
	fi
	python3 -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: .venv/.done ## deploy the whole stack on lab hosts and prove that it answers (FASTGPT_VERSION=v4.6.8 for another version)
	@$(BIN)/python lab/demo.py $(if $(FASTGPT_VERSION),--fastgpt-version $(FASTGPT_VERSION))

demo-down: .venv/.done ## remove what `make demo` made, and nothing else
	@$(BIN)/python lab/lab.py down --name demo
	rm -rf .demo

lab-clean: .venv/.done ## remove every lab with its images, wheels and models
	@$(BIN)/python lab/lab.py clean

test: .venv/.done ## the gate: all of the below
	@# Two lanes, told whole, and both have to pass. What only reckons takes what the modules, databases and doors leave over, since these watch clocks;
	@# the engines do as well and have the right of way over molecule, which mostly waits.
	mkdir -p .cache
	trap 'kill $$(jobs -p) 2>/dev/null || true' EXIT
	$(BIN)/python lab/lab.py prepare > .cache/prepare.log 2>&1 & prepared=$$!
	$(MAKE) --no-print-directory unit
	wait $$prepared && failed=0 || failed=$$?
	cat .cache/prepare.log
	[ $$failed = 0 ] || exit $$failed
	$(MAKE) --no-print-directory test-beside > .cache/beside.log 2>&1 & beside=$$!
	{ $(MAKE) --no-print-directory integration && nice -n 5 $(MAKE) --no-print-directory molecule; } || failed=$$?
	wait $$beside || failed=$$?
	cat .cache/beside.log
	exit $$failed

test-beside: .venv/.done
	@# all of them, whatever the first one finds
	nice -n 19 $(MAKE) --no-print-directory --keep-going lint sanity playbooks door-role && failed=0 || failed=$$?
	$(MAKE) --no-print-directory engines || failed=$$?
	exit $$failed

test-all: test molecule-cluster molecule-gpu molecule-gpu-dkms ## every scenario

lint: .venv/.done ## ansible-lint, yamllint, ruff, shellcheck, mypy, documentation and argument specifications
	@echo "=== lint"
	$(BIN)/yamllint -s .
	$(BIN)/ruff check .
	git ls-files '*.sh' .ci/run | xargs $(BIN)/shellcheck
	tests/mypy.sh
	ANSIBLE_COLLECTIONS_PATH=$(CURDIR)/.collections $(BIN)/ansible-lint --offline --profile production -q
	$(BIN)/antsibull-changelog lint
	tests/docs.sh

unit: .venv/.done ## pure functions, modules and scripts
	@echo "=== unit tests"
	PYTHONPATH=.collections:lab $(BIN)/python -m pytest -q -p no:cacheprovider -n 2 tests/unit

explore: .venv/.done ## property tests with many new random examples
	PYTHONPATH=.collections:lab $(BIN)/python -m pytest -q -p no:cacheprovider -n 2 --hypothesis-profile explore $$(grep -rl hypothesis tests/unit/plugins)

sanity: .venv/.done ## ansible-test sanity
	@echo "=== ansible-test sanity"
	tests/sanity.sh

integration: .venv/.done ## modules against a real mongod and One-API's stand-in, its nodes on real databases, the door with a real nginx
	@echo "=== integration tests"
	PYTHONPATH=.collections $(BIN)/python -m pytest -q -p no:cacheprovider -n 2 --dist worksteal tests/integration/door --ignore=tests/integration/door/test_door_role.py
	PYTHONPATH=.collections:lab $(BIN)/python -m pytest -q -p no:cacheprovider -n 5 --dist worksteal tests/integration/modules
	$(BIN)/python lab/lab.py prepare
	$(BIN)/python -m pytest -q -p no:cacheprovider -n 2 --dist loadfile tests/integration/stand_ins

door-role: .venv/.done ## the door's role on this machine, with a directory in the place of /etc/nginx
	@echo "=== tests of the door's role"
	PYTHONPATH=.collections $(BIN)/python -m pytest -q -p no:cacheprovider -n 2 tests/integration/door/test_door_role.py

engines: .venv/.done ## our chat engine and the clients of the model hubs, each in the environment that a model host gets
	@echo "=== engine tests"
	tests/engines/run.sh

playbooks: .venv/.done ## playbooks through ansible-runner: bad inventories, secrets, the installed tarball
	@echo "=== playbook tests"
	PYTHONPATH=.collections:lab $(BIN)/python -m pytest -q -p no:cacheprovider -n 2 tests/integration/playbooks

molecule: .venv/.done ## the whole stack on lab hosts: check, killed runs, converge, idempotence, testinfra
	@echo "=== molecule, scenario default"
	$(BIN)/python lab/lab.py prepare
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/molecule test -s default

molecule-cluster: .venv/.done ## many hosts: they grow, shrink and break while somebody asks; figures for docs/reliability.md
	@echo "=== molecule, scenario cluster"
	$(BIN)/python lab/lab.py prepare
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/molecule test -s cluster

molecule-gpu: .venv/.done ## driver, toolkit and CUDA on lab hosts that pretend to have GPUs, from signed stub repositories
	@echo "=== molecule, scenario gpu_hosts"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/molecule test -s gpu_hosts

molecule-gpu-dkms: .venv/.done ## a real build of Debian's own driver for a kernel of Debian's; minutes of download and compiler
	@echo "=== molecule, scenario gpu_dkms"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/molecule test -s gpu_dkms

bench-modules: .venv/.done ## seconds and requests of oneapi_channel beside a loop of uri, also in .bench/modules.json
	@$(BIN)/python bench/bench_modules.py

bench-door: .venv/.done ## what the door costs of a model server's throughput, also in .bench/door.json
	@PYTHONPATH=.collections $(BIN)/python bench/bench_door.py

bench-models: .venv/.done ## our model servers beside the way the seed's work, on this CPU, also in .bench/models.json
	@$(BIN)/python bench/bench_models.py

bench-gpu: .venv/.done ## the same on an NVIDIA GPU of this machine, with models of real shapes, also in .bench/gpu.json
	@$(BIN)/python bench/bench_gpu.py

bench-site: .venv/.done ## site.yml on 1 to 16 lab hosts beside the least that Ansible could do, also in .bench/site.json
	@$(BIN)/python bench/bench_site.py

killed-runs: .venv/.done ## kill site.yml after each of its tasks in turn (KILLS=n at most, SEED=n), also in docs/killed-runs.md
	@$(BIN)/python tests/support/killed_sweep.py

clean: ## forget caches and reports, keep the lab
	rm -rf .demo .bench .ansible .cache .mypy_cache .ruff_cache .pytest_cache tests/output
