# Two commands do everything: `make demo` and `make test`. Both create .venv, install torch and the rest, and build.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := Cargo.toml Cargo.lock pyproject.toml README.md LICENSE $(shell find src python kernels -type f -name '*.*' ! -name '*.so' ! -name '*.pyc' 2>/dev/null) build.rs .cargo/config.toml
export CARGO_TERM_COLOR := never

.PHONY: demo test lint bench sanitize clean

demo: $(VENV)/.demo
	$(BIN)/python -m flowdppo_ops demo

# Kernels are compiled where the package is built; Rust's own checks do without, and without NVRTC.
test: lint
	FLOWDPPO_KERNELS=none cargo test --locked --quiet
	$(BIN)/python tests/images.py
	$(BIN)/python -m pytest -q

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

# On a machine with an NVIDIA GPU and compute-sanitizer.
sanitize: $(VENV)/.test
	for tool in memcheck racecheck synccheck initcheck; do for unit in policy_loss sde_step; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    --kernel-name kns=$$unit $(BIN)/python -m pytest -q -m gpu tests/test_gpu*.py \
	    -k "options or dtypes or sizes or alignment" || exit 1; \
	done; done

clean:
	rm -rf $(VENV) target dist demo-out
