# Every target sets up .venv by itself. PYTHON can name another Python 3.11+.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test lint format clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[cpu,dev]"
# Its losses are an oracle of the tests. With its dependencies comes torchvision, of which there is no CPU build.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps open_clip_torch==3.3.0
# Its suites; of what it asks for, one package overwrites DeepSpeed's cpuinfo, and the rest is for chat models.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps langchain-tests==1.1.9
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/rayemb demo $(ARGS)

test: $(STAMP)
# Two processes: one waits for clusters while the other computes.
	$(BIN)/python -m pytest --numprocesses 2 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
