# Two commands do everything: `make demo` and `make test`. Both create .venv, install torch and the rest, and build.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := Cargo.toml Cargo.lock pyproject.toml README.md LICENSE $(shell find src python kernels -type f -name '*.*' ! -name '*.so' ! -name '*.pyc' 2>/dev/null) build.rs .cargo/config.toml
export CARGO_TERM_COLOR := never

.PHONY: demo test test-all versions wheel lint bench gpu sanitize clean

demo: $(VENV)/.demo
	$(BIN)/python -m flowdppo_ops demo

# What guards every change: minutes, and once installed no network. Kernels are compiled where the package is built;
# Rust's own checks do without, and without NVRTC.
test: lint
	FLOWDPPO_KERNELS=none cargo test --locked --quiet
	$(BIN)/python tests/images.py
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not install and not gpu"

# The rest too: planted faults, data races, Inductor, fresh environments, the wheel, and every PyTorch since 2.6. An hour
# or more, and the package index.
test-all: test wheel versions
	$(BIN)/python -m pytest -q -m "slow or install"

# The tests of the operators on every PyTorch since 2.6 and every Python since 3.10; half an hour and the package index.
versions: | $(BIN)/python
	$(BIN)/python tests/versions.py

# The wheel and the sdist of a release, in dist/; needs the package index.
wheel: | $(BIN)/python
	$(BIN)/python tests/wheel.py

lint: $(VENV)/.test
	cargo fmt --check
	FLOWDPPO_KERNELS=none cargo clippy --locked --quiet --all-targets -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@files=$$(git ls-files 'kernels/*' 'tests/*.cpp' 'tests/*.h' 'kernels/**' 'tests/**/*.cpp' 'tests/**/*.h' 2>/dev/null); [ -z "$$files" ] || $(BIN)/clang-format --dry-run --Werror $$files

bench: $(VENV)/.test
	$(BIN)/python benches/bench_policy_loss.py
	$(BIN)/python benches/bench_sde_step.py

# A stamp per set of extras; the package is rebuilt when a source changes. Cargo's target folder keeps that short.
$(VENV)/.demo: $(SOURCES) | $(BIN)/python
	$(BIN)/pip install --quiet '.[demo]'
	touch $@

$(VENV)/.test: $(SOURCES) | $(BIN)/python
	$(BIN)/pip install --quiet '.[demo,test]'
	touch $@ $(VENV)/.demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

# On a machine with an NVIDIA GPU, and compute-sanitizer for its stages. gpu-out has a log of each stage and the rows.
gpu: $(VENV)/.test
	$(BIN)/python benches/on_gpu.py gpu-out

sanitize: $(VENV)/.test
	$(BIN)/python benches/on_gpu.py gpu-out sanitize

clean:
	rm -rf $(VENV) target dist demo-out gpu-out
