# Every target sets itself up in .venv from a fresh clone, and does nothing twice.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
OLD := .venv-old-trl

.PHONY: demo test test-all check schemas docs

demo: $(READY)
	$(BIN)/prefkit demo

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" -n 2

test-all: test $(OLD)/.ready
	$(BIN)/python -m pytest -m slow -n 2

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layering.py

schemas: $(READY)
	$(BIN)/python -m prefkit.schemas schemas

docs: $(READY)
	$(BIN)/python tools/api_page.py docs/api.md

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# an old trl on .venv's torch, for one test: what is pinned here hides what .venv has newer
$(OLD)/.ready: constraints-old-trl.txt $(READY)
	$(BIN)/python -m venv --clear --without-pip $(OLD)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$($(OLD)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/of_venv.pth"
	$(BIN)/python -m pip --python $(OLD)/bin/python install --quiet --disable-pip-version-check \
		--no-deps --ignore-installed -r constraints-old-trl.txt
	touch $@
