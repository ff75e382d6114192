# The commands of a checkout. They need python3 (3.11 to 3.13) with venv, and bash.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
ARGS ?=
BIN := $(abspath $(VENV))/bin
REQUIREMENTS := pyproject.toml constraints.txt

# torchrun, ninja and deepspeed are looked up on PATH.
IN_VENV := PATH="$(BIN):$$PATH"
# A suite that neither asks for a network nor lets workers fight for the cores. There are three for two cores: one waits for Slurm.
TEST_ENV := DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 WANDB_MODE=offline HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help install quickstart test test-faults slurm-packages wheelhouse check format gpu clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' Makefile | while IFS='|' read -r name text; do printf '%-22s %s\n' "$$name" "$$text"; done
	@echo "Variables: VENV=.venv  PYTHON=python3  ARGS='options passed on'"

install: $(VENV)/.dev-installed ## everything that development needs, into .venv

quickstart: $(VENV)/.core-installed ## data, VAE, DiT and generated videos in runs/quickstart, on this machine
	$(IN_VENV) muybridge quickstart $(ARGS)

test: $(VENV)/.dev-installed ## the whole CPU test suite
	$(IN_VENV) $(TEST_ENV) python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

test-faults: $(VENV)/.dev-installed ## more faults done to real runs than `make test` does; minutes
	$(IN_VENV) $(TEST_ENV) python -m pytest -n 2 --dist loadfile -m faults tests/faults $(ARGS)

# From Debian, as the tests start them: without recommended packages, whose daemons nobody here needs.
slurm-packages: ## what the tests of the Slurm part need (Debian, root); without it they are skipped
	@for program in slurmctld slurmd sbatch munged ip shellcheck; do \
	  PATH="$$PATH:/usr/sbin:/sbin" command -v "$$program" >/dev/null || missing=yes; done; \
	if [ "$${missing:-no}" = yes ]; then \
	  apt-get update -qq; \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    slurmctld slurmd slurm-client munge iproute2 shellcheck; \
	fi

# Old wheels must not stay: pip takes the newest that it finds. What the last build left in build/ would go into the package's own.
EXTRAS ?= text
wheelhouse: $(VENV)/bin/pip ## all wheels for a machine without a network, into wheelhouse/ (EXTRAS=text,s3,scenes)
	rm -rf build wheelhouse
	@echo 'Collecting wheels: about a minute, longer where torch comes with CUDA.'
	$(BIN)/pip wheel --quiet -c constraints.txt -w wheelhouse '.[$(EXTRAS)]'
	@# Nothing but the folder: neither what is installed here nor where pip otherwise looks.
	PIP_CONFIG_FILE=/dev/null $(BIN)/pip --isolated install --quiet --dry-run --ignore-installed \
	  --no-index --find-links wheelhouse 'muybridge[$(EXTRAS)]'
	@cd wheelhouse && python=python$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])') && printf '%s\n' \
	  "Muybridge for $$python on $$(uname -sm), with $$(ls torch-*.whl). Copy this folder to the machine, and there, beside it:" '' \
	  "  $$python -m venv muybridge" \
	  "  muybridge/bin/pip install --no-index --find-links wheelhouse 'muybridge[$(EXTRAS)]'" '' \
	  'Then: muybridge/bin/muybridge --version; muybridge/bin/muybridge train +experiment=quickstart dry_run=true' '' \
	  'A torch whose name says +cpu uses no GPU. Either let PIP_FIND_LINKS or PIP_INDEX_URL lead `make wheelhouse` to one for CUDA, or' \
	  'install into a Python that has its torch (2.11 to 2.13, a module or a container): say --system-site-packages after venv, and' \
	  'remove torch-*, triton-* and nvidia_* from this folder. Nodes need a C compiler and the headers of Python for Triton.' >INSTALL.txt
	@cat wheelhouse/INSTALL.txt; echo; echo "Wrote $$(ls wheelhouse/*.whl | wc -l) wheels, $$(du -sh wheelhouse | cut -f 1), to wheelhouse/"

check: $(VENV)/.dev-installed .source/muybridge ## lint, format and types, without changing a file
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	cd .source && $(IN_VENV) mypy --config-file muybridge/pyproject.toml --cache-dir muybridge/.mypy_cache -p muybridge

format: $(VENV)/.dev-installed ## mend lint and format where that is automatic
	$(IN_VENV) ruff check --fix .
	$(IN_VENV) ruff format .

# Nothing is installed: a machine with the GPU often has its own torch and no network. PYTHONSAFEPATH keeps the checkout's own folder
# off sys.path, where `kernels` and `data` would be found as top-level packages.
gpu: .source/muybridge ## kernels, quickstart and the 1.3B model on a CUDA GPU; results in benchmarks/results
	PYTHONSAFEPATH=1 PYTHONPATH="$(CURDIR)/.source$${PYTHONPATH:+:$$PYTHONPATH}" \
	  $(or $(PYTHON),$(wildcard $(VENV)/bin/python),python3) -m muybridge.scripts.gpu_suite $(ARGS)

clean: ## remove caches and build leftovers; keeps .venv and runs
	rm -rf .source .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info

# The checkout is the package, whatever its folder is called: this link gives it the name `muybridge`. The folder is hidden so that
# no tool walks into the cycle.
.source/muybridge:
	mkdir -p .source
	ln -sfn .. .source/muybridge

$(VENV)/bin/pip:
	@$(or $(PYTHON),python3) -c 'import sys; v = sys.version_info[:2]; \
	  (3, 11) <= v < (3, 14) or sys.exit("muybridge needs Python 3.11 to 3.13; PYTHON=%s is %d.%d" % (sys.executable, *v))'
	$(or $(PYTHON),python3) -m venv $(VENV)

# A stamp an extra: the quickstart need not wait for the developers' tools. Compiling every module ahead would cost a minute of
# CPU time; Python compiles those that are used at their first import.
INSTALL := $(BIN)/pip install --quiet --no-compile -c constraints.txt
$(VENV)/.core-installed: $(REQUIREMENTS) | $(VENV)/bin/pip
	@echo 'Installing into $(VENV): a minute or two, longer where torch comes with CUDA.'
	$(INSTALL) -e '.[text]'
	touch $@

$(VENV)/.dev-installed: $(REQUIREMENTS) | $(VENV)/bin/pip
	@echo 'Installing into $(VENV): a minute or two, longer where torch comes with CUDA.'
	$(INSTALL) -e '.[dev]'
	touch $(VENV)/.core-installed $@
