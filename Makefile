# make demo: the first comparison.  make test: everything that is checked.  Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2

.PHONY: demo test test-integrations test-integrations-fast lint docs bench tables claims clean

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
RECORDED := $(if $(RECORD),--record $(RECORD))

test-integrations-fast: .venv/installed-integrations
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(RECORDED) \
		--ignore tests_integrations/own_environment tests_integrations

# What is large, or would change what others do beside it, has an environment on top of .venv.
OWN := deepspeed optax ray timm
OWN_deepspeed := deepspeed
OWN_optax := jax optax
OWN_ray := "ray[train]"
OWN_timm := --no-deps timm

.venv/own/%/installed: .venv/installed
	$(BIN)/python -m venv $(@D)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> $$($(@D)/bin/python -c "import site; print(site.getsitepackages()[0])")/base.pth
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt $(OWN_$*)
	touch $@

test-integrations: test-integrations-fast $(OWN:%=.venv/own/%/installed)
	for name in $(OWN); do \
		OMP_NUM_THREADS=1 .venv/own/$$name/bin/python -m pytest $(RECORDED) \
			tests_integrations/own_environment/test_$${name}_*.py || exit; \
	done

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
