# make demo and make test are all a newcomer needs; each sets up .venv by itself, and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-long check docs bench dist

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,onnx,tiff]'
	touch $@

demo: install  ## train on the sample for two minutes, then measure it with labels
	$(BIN)/barlow pretrain sample --out runs/demo --minutes 2
	$(BIN)/barlow evaluate runs/demo --labels sample
	@echo "Open runs/demo/report.html in a browser."

test: check  ## lint, types, documentation and all tests but the long ones
	$(BIN)/python -m pytest

test-long: check  ## every test
	$(BIN)/python -m pytest -m "long or not long"

check: install  ## lint, types and documentation only
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(MAKE) --no-print-directory docs

docs: install  ## the documentation, into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: install  ## the benchmarks, one after the other; quiet machine, half an hour
	for file in objective views data step; do $(BIN)/python benchmarks/$$file.py || exit 1; done

dist: install  ## wheel and sdist, the wheel installed into an empty environment, and the main job run from there
	rm -rf dist build/empty && $(BIN)/python -m hatchling build
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.whl
	cd build/empty && bin/barlow --version && bin/barlow pretrain sample --out run --steps 20 \
	&& bin/barlow export run --to timm -o folder && bin/barlow embed run sample -o sample.parquet
