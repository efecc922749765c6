# Every target sets up what it needs in .venv; only Python >= 3.10, make and a C compiler must be there.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= out/demo

.PHONY: demo test lint setup clean native
setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*/* native/*/*/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "scikit-build-core>=0.10" "cmake>=3.18" ninja
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev,rivals]"
	@touch $@

demo: setup
	$(BIN)/espalier compress lenet_digits --data digits --density 0.1 --dense-epochs 20 --epochs 60 --recipe.batch_size 32 --seed 0 --out $(OUT) --resume

native: setup  # after editing C: the library where a checkout looks for it
	$(BIN)/cmake -S . -B build/dev -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
	$(BIN)/cmake --build build/dev

lint: setup
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check --quiet src tests benchmarks examples
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not alone"  # a core each
	$(BIN)/python -m pytest -m alone

clean:
	rm -rf .venv build out src/espalier/_native
