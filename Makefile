# Everything runs in .venv, made on first use from constraints.txt. An interpreter that has the packages already can be
# named instead, and installs nothing: make test PYTHON=python3
.RECIPEPREFIX := >
VENV := .venv
PYTHON ?= $(VENV)/bin/python
ENVIRONMENT := $(if $(filter $(VENV)/bin/python,$(PYTHON)),$(VENV)/.installed,)

.PHONY: setup demo test test-slow test-gpu reliability lint fix bench bench-kernels bench-gpu gpu gpu-check

setup: $(ENVIRONMENT)

$(VENV)/.installed: pyproject.toml constraints.txt
> python3 -m venv $(VENV)
> $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[report,parquet,test,dev]'
> touch $@

demo: $(ENVIRONMENT)
> $(PYTHON) -m train.run --preset demo

# A process a core, at most four; one that has nothing left takes tests from another.
test: $(ENVIRONMENT)
> $(PYTHON) -m pytest -q -n logical --maxprocesses 4 --dist worksteal

test-slow: $(ENVIRONMENT)
> $(PYTHON) -m pytest -q -m slow

test-gpu: $(ENVIRONMENT)
> $(PYTHON) -m pytest -q -rs -m gpu

# A card's first half hour and what follows it, each part under ten minutes (benchmarks/README.md). It ends where the first
# part finds a fault; after that a part that fails is a result too. PARTS names those to do.
PARTS ?= tests ceilings tune kernels decide E1 E2 E3 E4 E5 E6 E7 E8 preset
gpu: gpu-check
> @status=0; \
> for part in $(PARTS); do \
>   echo "== $$part"; \
>   case $$part in \
>     tests) set -- pytest -q -rs -m gpu ;; \
>     ceilings) set -- benchmarks.kernels --minutes 0 ;; \
>     tune) set -- benchmarks.tune --minutes 8 ;; \
>     kernels) set -- benchmarks.kernels --minutes 8 ;; \
>     decide) set -- benchmarks.kernels --decide ;; \
>     preset) set -- benchmarks.preset ;; \
>     *) set -- benchmarks.versus_peft --device cuda --rows $$part ;; \
>   esac; \
>   timeout 600 $(PYTHON) -m "$$@" || status=1; \
> done; \
> $(PYTHON) -m benchmarks.readme; \
> exit $$status

gpu-check: $(ENVIRONMENT)
> timeout 90 $(PYTHON) -m benchmarks.kernels --check
> timeout 90 $(PYTHON) -m pytest -q -x -rs -m gpu tests/kernels/test_varlen.py tests/kernels/test_linears.py tests/models/test_triton_models.py

reliability: $(ENVIRONMENT)
> $(PYTHON) -m benchmarks.reliability

lint: $(ENVIRONMENT)
> $(PYTHON) -m ruff check .
> $(PYTHON) -m ruff format --check .
> $(PYTHON) -m pyright

fix: $(ENVIRONMENT)
> $(PYTHON) -m ruff check --fix .
> $(PYTHON) -m ruff format .

bench: $(ENVIRONMENT)
> $(PYTHON) -m benchmarks.versus_peft --rounds 1
> $(PYTHON) -m benchmarks.data --rounds 1
> $(PYTHON) -m benchmarks.readme

bench-kernels: $(ENVIRONMENT)
> $(PYTHON) -m benchmarks.kernels --minutes 8
> $(PYTHON) -m benchmarks.readme

# A row that fails is a result too: the others are measured, and the table is written, all the same.
bench-gpu: $(ENVIRONMENT)
> @status=0; \
> for rows in "E1" "E2 E3" "E4" "E5 E6" "E7 E8"; do \
>   $(PYTHON) -m benchmarks.versus_peft --device cuda --rows $$rows || status=$$?; \
> done; \
> $(PYTHON) -m benchmarks.readme; \
> exit $$status
