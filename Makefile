# Two commands for a fresh machine: `make demo` and `make test`. Both make the environment in .venv first.
# `make help` lists them all. None ends a process that it did not start.

PYTHON ?= python3
VENV := .venv/bin

.PHONY: environment help demo test train ddp-train sample bench gpu-status torture mutants format
.DEFAULT_GOAL := environment

PIP := $(VENV)/python -m pip --quiet --disable-pip-version-check install

# The project itself is installed in place, for the command `orchestrate`.
.venv/.stamp: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

.venv/.stamp-dev: .venv/.stamp requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@

environment: .venv/.stamp ## make .venv, with the command `orchestrate` in it

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

data/python_docs/meta.json: | .venv/.stamp
	$(VENV)/python data/python_docs/prepare.py

demo: .venv/.stamp data/python_docs/meta.json ## data, two minutes of a run that a schedule steers, a sample
	rm -rf out-demo
	$(VENV)/python train_orchestrated.py config/python_docs.py --schedule schedules/demo.yaml --out_dir=out-demo
	$(VENV)/python sample.py --out_dir=out-demo --start="The " --num_samples=1 --max_new_tokens=300
	@echo "Look into out-demo: report.html shows how it went, events.jsonl says what the schedule did and why,"
	@echo "checkpoints/latest is where --init_from=resume --out_dir=out-demo --max_iters=1200 goes on."

test: .venv/.stamp-dev ## formatting, lint and the whole test suite
	$(VENV)/ruff format --check .
	$(VENV)/ruff check .
	$(VENV)/python -m pytest -n 2

# CONFIG=config/x.py, SCHEDULE=schedules/y.yaml, and further keys as ARGS="--max_iters=100 --out_dir=out-x".
ARGS ?=
NGPUS ?= 1
OUT ?= out
START ?= The
options = $(if $(CONFIG),,$(error give CONFIG=config/NAME.py))$(CONFIG) $(if $(SCHEDULE),--schedule $(SCHEDULE)) $(ARGS)

train: .venv/.stamp ## CONFIG=FILE [SCHEDULE=FILE] [ARGS="--KEY=VALUE ..."]: train on one process
	$(VENV)/python train_orchestrated.py $(options)

ddp-train: .venv/.stamp ## NGPUS=N CONFIG=FILE [SCHEDULE=FILE] [ARGS=...]: train on N processes, a GPU each
	$(VENV)/python -m torch.distributed.run --standalone --nproc_per_node=$(NGPUS) train_orchestrated.py $(options)

sample: .venv/.stamp ## OUT=RUN [START="text"] [ARGS=...]: text from a run
	$(VENV)/python sample.py --out_dir=$(OUT) --start="$(START)" $(ARGS)

bench: .venv/.stamp ## [CONFIG=FILE] [ARGS=...]: tokens per second of a step
	$(VENV)/python bench/step.py $(or $(CONFIG),config/shakespeare_char_cpu.py) $(ARGS)

gpu-status: .venv/.stamp ## GPUs, their use and the processes on them
	@$(VENV)/python -m orchestrate.tools.gpu_status

torture: .venv/.stamp ## many kills and signals, and the end of each run compared (bench/torture.py)
	$(VENV)/python bench/torture.py

MUTANTS ?= 40
mutants: .venv/.stamp-dev ## [MUTANTS=N]: small faults that the tests must find (bench/mutants.py)
	$(VENV)/python bench/mutants.py --mutants $(MUTANTS)

format: .venv/.stamp-dev ## ruff
	$(VENV)/ruff format .
	$(VENV)/ruff check --fix .
