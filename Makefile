PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test check bench results clean

setup: $(STAMP)

# torch first and pinned: an open range would make pip fetch gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/python -m pip install --quiet -e ".[all,dev]" -c constraints.txt
	touch $@

demo: setup
	$(BIN)/sixfold demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest -q -m "not slow and not compile"
	$(BIN)/python tools/count_lines.py

bench: setup
	$(BIN)/python -m benchmarks.run

results: setup
	$(BIN)/sixfold demo --json docs/results/demo.json
	$(BIN)/python -m benchmarks.key_map --json docs/results/key_map.json
	$(BIN)/python -m benchmarks.rotation --json docs/results/rotation.json
	$(BIN)/python tools/render_results.py

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
