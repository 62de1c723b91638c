# make demo: the first comparison.  make test: everything that is checked.  Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2

.PHONY: demo test test-integrations lint docs bench tables claims clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'nomadam needs Python 3.11 or newer')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[lab,baselines,test]"
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

.venv/installed-bench: .venv/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[bench]"
	touch $@

.venv/installed-integrations: .venv/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[integrations]"
	touch $@

demo: .venv/installed
	$(BIN)/nomadam compare gpt2_pretraining.demo

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --doctest-modules nomadam tests

# With RECORD=FILE, what passed with which versions is put into a table there.
test-integrations: .venv/installed-integrations
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(if $(RECORD),--record $(RECORD)) tests_integrations

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv/installed-docs
	cp results/gpt2_demo/figures/learning_curves_steps.png docs/pictures/demo_learning_curves.png
	cp results/gpt2_demo_learning_rates/figures/learning_rate_sensitivity.png docs/pictures/demo_learning_rates.png
	$(BIN)/mkdocs build --strict --quiet

bench: .venv/installed-bench
	$(BIN)/python benchmarks/run_all.py

tables: .venv/installed
	$(BIN)/python benchmarks/tables.py

claims: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/nomadam claims --workers $(JOBS) --page docs/reproducing.md --pictures runs/claims_pictures

clean:
	rm -rf .venv site build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
