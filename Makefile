# `make test` and `make bench` do everything, set-up included. PYTHON=python3.12 picks the interpreter.
PYTHON ?= python3
# Used only where PYTHON has no torch >= 2.10 of its own.
TORCH ?= torch==2.13.0
RUN := .venv/bin/python
CSRC := $(shell find csrc -type f)
CPP = $(shell find csrc tests -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")

.PHONY: test bench lint format clean gpu-lib gpu-check

test: .venv/built
	$(RUN) -m pytest -n 2 --timeout=600 $(ARGS)

bench: .venv/built
	$(RUN) -m bench.throughput --short $(ARGS)

lint: .venv/built
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	.venv/bin/clang-format --dry-run -Werror $(CPP)

format: .venv/built
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	.venv/bin/clang-format -i $(CPP)

# What `make gpu-check` runs, built where there is no GPU: no minute of one goes to compilers.
gpu-lib: export FPI_CUDA = 1
gpu-lib: export FPI_CUDA_ARCHS ?= 9.0
gpu-lib: .venv/ready
	$(RUN) setup.py -q build_ext --inplace
	$(RUN) .ci/build_sanitize_driver.py

# With PYTHON's own torch, on a machine with a GPU. ARGS="--dry-run" lists what it does.
gpu-check:
	"$(PYTHON)" .ci/gpu_check.py $(ARGS)

clean:
	rm -rf .venv build *.egg-info fpi_cuda/*.so

.venv/built: .venv/ready setup.py pyproject.toml $(CSRC)
	$(RUN) setup.py -q build_ext --inplace
	$(RUN) -m pip install --no-build-isolation -e ".[test,bench,dev]"
	touch $@

.venv/ready: .ci/make_venv.py
	"$(PYTHON)" .ci/make_venv.py .venv "$(TORCH)"
	touch $@
