PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := CMakeLists.txt $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cmake)
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Plain Python where there is no compiler; where there is one, an error is shown, not survived.
COMPILER := $(shell command -v $(firstword $(or $(CXX),c++)) 2>/dev/null)
REQUIRE := SIXFOLD_REQUIRE_EXTENSION=$(if $(COMPILER),1,0)

.PHONY: setup demo test check docs bench bench-gpu bench-vllm-gpu results results-cpu sanitize test-neon clean

setup: $(STAMP)

# torch first and pinned: an open range would make pip fetch gigabytes of CUDA packages.
$(VENV)/.dependencies: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(REQUIRE) $(PIP) install --quiet -e ".[all,dev]" -c constraints.txt
	touch $@ $(STAMP)

$(STAMP): $(VENV)/.dependencies $(NATIVE)
	test -z "$$(find $(NATIVE) -newer $@ 2>&1)" || \
	  $(REQUIRE) $(PIP) install --quiet --no-deps -e .
	touch $@

demo: setup
	$(BIN)/sixfold demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site of docs/, in site/. Whatever mkdocs warns of is an error: a link or anchor that leads nowhere,
# a page that the navigation lacks, a name that the code lacks. It asks no network.
docs: setup
	$(BIN)/python -m mkdocs build --strict

# Tests of small tensors gain nothing from threads: each process has one. JOBS=0: no other processes.
JOBS ?= auto
FAST := -q -n $(JOBS) --maxprocesses 8 --dist worksteal -m "not slow and not compile"
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(FAST)
	$(BIN)/python tools/count_lines.py

# Every fast test on the oldest versions that pyproject.toml declares, and on the newest there are.
# Environments of their own; pip's variables (PIP_INDEX_URL) choose an index of torch without CUDA.
TRIED := oldest newest
PYTHON.oldest ?= python3.11
PYTHON.newest ?= $(PYTHON)
VERSIONS.oldest := -c requirements-oldest.txt
VERSIONS.newest := --upgrade --upgrade-strategy eager
# What old packages say of newer ones that stand below them.
WARNED.oldest := -W "ignore:'click.utils:DeprecationWarning" \
  -W ignore::pyparsing.PyparsingDeprecationWarning
.PHONY: $(TRIED:%=test-%)
$(TRIED:%=.venv-%/.installed): .venv-%/.installed: pyproject.toml requirements-oldest.txt $(NATIVE)
	test -x .venv-$*/bin/python || $(PYTHON.$*) -m venv .venv-$*
	$(REQUIRE) .venv-$*/bin/python -m pip --disable-pip-version-check install --quiet \
	  $(VERSIONS.$*) -e ".[all]" beartype grimp hypothesis pytest pytest-xdist --config-settings=build-dir=build/$*
	touch $@

$(TRIED:%=test-%): test-%: .venv-%/.installed
	.venv-$*/bin/python -m pip list --format=freeze | grep -E "^(torch|transformers|numpy)="
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest $(FAST) $(WARNED.$*)

# vLLM wants packages of its own: an environment beside ours. VLLM_OVERLAY: tools/vllm_overlay.py.
VLLM_VENV := .venv-vllm$(addprefix -,$(VLLM_OVERLAY))
VLLM := $(VLLM_VENV)/bin
.PHONY: test-vllm test-vllm-full
$(VLLM_VENV)/.installed: requirements-vllm.txt pyproject.toml $(NATIVE)
	test -x $(VLLM)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM)/python -m pip --disable-pip-version-check install --quiet --no-deps -r requirements-vllm.txt
	$(REQUIRE) $(VLLM)/python -m pip --disable-pip-version-check install --quiet --no-deps -e . \
	  --config-settings=build-dir=build/$(VLLM_VENV)
	$(if $(VLLM_OVERLAY),$(VLLM)/python tools/vllm_overlay.py $(VLLM_OVERLAY))
	touch $@

PYTEST_VLLM = $(VLLM)/python -m pytest -q -p no:cacheprovider -o addopts=--import-mode=importlib tests/vllm
test-vllm: $(VLLM_VENV)/.installed
	$(PYTEST_VLLM) -m "not slow"

test-vllm-full: $(VLLM_VENV)/.installed
	$(PYTEST_VLLM)

# Ten minutes of random load, and then about half as long to compare the answers.
SECONDS := 600
SEED := 0
.PHONY: soak-vllm
soak-vllm: $(VLLM_VENV)/.installed
	$(VLLM)/python -m tests.vllm.soak --seconds $(SECONDS) --seed $(SEED)

# LangChain's suite for vector stores brings plugins of pytest that would change other tests.
.PHONY: test-langchain
.venv-langchain/.installed: pyproject.toml $(NATIVE)
	test -x .venv-langchain/bin/python || $(PYTHON) -m venv .venv-langchain
	$(REQUIRE) .venv-langchain/bin/python -m pip --disable-pip-version-check install --quiet \
	  -e ".[langchain]" beartype langchain-tests pytest --config-settings=build-dir=build/langchain
	touch $@

test-langchain: .venv-langchain/.installed
	.venv-langchain/bin/python -m pytest -q -p no:cacheprovider -o asyncio_mode=auto \
	  -o asyncio_default_fixture_loop_scope=function tests/unit/test_langchain.py

bench: setup
	$(BIN)/python -m benchmarks.run --op attention

# On the machine with the GPU, whose own Python has torch and Triton: no environment is made.
bench-gpu:
	PYTHONPATH=src:. $(PYTHON) -m benchmarks.gpu --json docs/results/gpu.json

# The same for vLLM: the environment that PYTHON is of has vllm, sixfold, and their packages.
bench-vllm-gpu:
	PYTHONPATH=. $(PYTHON) -m benchmarks.vllm_gpu \
	  --json $(if $(OUT),$(OUT),docs/results)/vllm_gpu.json

# What does not depend on the machine's speed, but for the demo's tokens/s: an hour on two cores.
results: setup
	$(BIN)/sixfold demo --json docs/results/demo.json
	for study in key_map key_map_chunks key_map_beginnings key_map_unseen rotation trellis_choices \
	  recipe reproduction long_context; do \
	  $(BIN)/python -m benchmarks.$$study --json docs/results/$$study.json || exit 1; done
	$(BIN)/python -m benchmarks.trellis --out docs/results
	$(BIN)/python -m benchmarks.codes plain hard --windows 4 --json docs/results/codes.json
	$(BIN)/python -m benchmarks.evaluate --out docs/results
	$(BIN)/python -m benchmarks.needles --json docs/results/needles.json --plot docs/needles.png
	$(BIN)/python -m tools.render_results

# docs/evaluation.md's table of other texts, and docs/cpu.md's of real models. TEXTS: plain text files, of which
# the table names wikitext2.txt and code.txt. What was measured is kept in build/texts, and a stop costs little.
WINDOW := 2048
WINDOWS := 8
.PHONY: results-texts results-speed
results-texts: setup
	for text in $(TEXTS); do folder=build/texts/$$(basename $$text .txt); mkdir -p $$folder; \
	  for model in $(REAL_MODELS); do name=$$folder/$$(basename $$model); \
	  $(BIN)/sixfold eval perplexity $$model --file $$text --dtype bfloat16 --bits 4,3,2.5,2 \
	  --against fp8,q4_0,kivi-4 --window $(WINDOW) --windows $(WINDOWS) --resume $$name.part \
	  --json $$name.json || exit 1; done; done
	$(BIN)/python -m tools.real_texts build/texts/*/*.json --json docs/results/real_texts.json
	$(BIN)/python -m tools.render_results
results-speed: setup
	for model in $(REAL_MODELS); do $(BIN)/python -m benchmarks.real_speed $$model --text "$(BOOK)" \
	  --tokens 1024,4096,8192 --json docs/results/real_speed.json || exit 1; done
	$(BIN)/python -m tools.render_results

# README's table of real models. REAL_MODELS: directories or hub names. BOOK: a text file.
REAL_MODELS ?= HuggingFaceTB/SmolLM2-135M-Instruct google/gemma-3-270m \
  Qwen/Qwen2.5-Coder-1.5B-Instruct
REAL_OPTIONS = --bits 4,3,2.5,2 --against fp8,q4_0 --window 768 --prefill 512 --chunk 64 --windows 24
.PHONY: results-real
results-real: setup
	@test -f "$(BOOK)" || { echo "results-real needs BOOK=FILE, a novel as plain text"; exit 1; }
	mkdir -p build/real
	for model in $(REAL_MODELS); do $(BIN)/sixfold eval perplexity $$model --file "$(BOOK)" \
	  $(REAL_OPTIONS) --json build/real/$$(basename $$model).json || exit 1; done
	$(BIN)/python -m tools.real_models build/real/*.json --json docs/results/real_models.json
	$(BIN)/python -m tools.render_results

# Times on this machine's processor, with nothing else running. VLLM_PYTHON: see CONTRIBUTING.md.
ISAS := avx512,avx2
BENCH = $(BIN)/python -m benchmarks.run
BUSY = $(BENCH) --op generate --model embedded --steps 8 --tokens 1024,2048,8192
results-cpu: setup
	$(BENCH) --op attention --codes codebook --threads 1,2 --isa $(ISAS) --bits 4,3.5,3,2.5,2,8 --tokens 32768 \
	  $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON)) --json docs/results/cpu_attention.json
	$(BENCH) --op attention --codes codebook --tokens 1024,4096,16384,131072 --bits 4,2.5 \
	  --json docs/results/cpu_lengths.json
	$(BENCH) --op attention --threads 1 --isa $(ISAS),portable --bits 4,2.5,2 --codes codebook trellis \
	  --tokens 32768 --json docs/results/cpu_trellis.json
	for op in encode scores; do $(BENCH) --op $$op --threads 1,2 --tokens 32768 --repeats 7 \
	  --json docs/results/cpu_$$op.json || exit 1; done
	$(BENCH) --op step --json docs/results/cpu_step.json
	$(BENCH) --op generate --steps 4 --repeats 3 --json docs/results/cpu_generate.json
	$(BUSY) --busy 0,1 --repeats 100 --json docs/results/cpu_busy_apart.json
	$(BUSY) --busy 0,0 --repeats 12 --json docs/results/cpu_busy_together.json
	$(BENCH) --op prefill --tokens 1024 --repeats 3 --json docs/results/cpu_prefill.json
	$(BIN)/python -m tools.render_results

# Where the system has no CMake, the environment gets one.
CMAKE = PATH="$$PATH:$(abspath $(BIN))" cmake
CTEST = PATH="$$PATH:$(abspath $(BIN))" ctest --output-on-failure
CROSS := aarch64-linux-gnu
QEMU := qemu-aarch64

.PHONY: cmake
cmake:
	@command -v cmake >/dev/null || test -x $(BIN)/cmake || \
	  { test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); $(PIP) install --quiet cmake; }

sanitize: cmake
	$(CMAKE) -S csrc/selftest -B build/asan -DSIXFOLD_SANITIZE=address,undefined
	$(CMAKE) --build build/asan --parallel
	$(CTEST) --test-dir build/asan
	$(CMAKE) -S csrc/selftest -B build/tsan -DSIXFOLD_SANITIZE=thread
	$(CMAKE) --build build/tsan --parallel
	$(CTEST) --test-dir build/tsan

test-neon: cmake
	@command -v $(CROSS)-g++ >/dev/null && command -v $(QEMU) >/dev/null || \
	  { echo "test-neon needs $(CROSS)-g++ and $(QEMU)" \
	    "(Debian, Ubuntu: apt-get install g++-$(CROSS) qemu-user)"; exit 1; }
	$(CMAKE) -S csrc/selftest -B build/neon -DCMAKE_SYSTEM_NAME=Linux \
	  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(CROSS)-g++ \
	  "-DCMAKE_CROSSCOMPILING_EMULATOR=$(QEMU);-L;/usr/$(CROSS)"
	$(CMAKE) --build build/neon --parallel
	$(CTEST) --test-dir build/neon

clean:
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
