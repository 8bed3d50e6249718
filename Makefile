# Two commands for a fresh machine: `make demo` and `make test`. Both make the environment in .venv first.

PYTHON ?= python3
VENV := .venv/bin

.PHONY: demo test torture mutants format

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

data/python_docs/meta.json: | .venv/.stamp
	$(VENV)/python data/python_docs/prepare.py

demo: .venv/.stamp data/python_docs/meta.json
	rm -rf out-demo
	$(VENV)/python train_orchestrated.py config/python_docs.py --schedule schedules/demo.yaml --out_dir=out-demo
	$(VENV)/python sample.py --out_dir=out-demo --start="The " --num_samples=1 --max_new_tokens=300
	@echo "Look into out-demo: events.jsonl says what the schedule did and why, metrics.jsonl how the loss went,"
	@echo "checkpoints/latest is where --init_from=resume --out_dir=out-demo --max_iters=1200 goes on."

test: .venv/.stamp-dev
	$(VENV)/ruff format --check .
	$(VENV)/ruff check .
	$(VENV)/python -m pytest -n 2

torture: .venv/.stamp
	$(VENV)/python bench/torture.py

MUTANTS ?= 40
mutants: .venv/.stamp-dev
	$(VENV)/python bench/mutants.py --mutants $(MUTANTS)

format: .venv/.stamp-dev
	$(VENV)/ruff format .
	$(VENV)/ruff check --fix .
