# make demo    set up, train the synthetic task with GRPO's fixed clip and with Band, compare   (two to three minutes)
# make test    set up, run the tests
# make help    everything else
# All work on a fresh machine with git, make, Python 3.11 or later and a C compiler. What is installed goes to .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NVIDIA := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
DEVICE := $(if $(NVIDIA),gpu,cpu)
SET := $(if $(NVIDIA),requirements-gpu.lock,requirements-cpu.txt) requirements-dev.txt
DISK := $(if $(NVIDIA),12,5)# GB that the set takes
STAMP := $(VENV)/.installed-$(DEVICE)
UV := uv==0.13.9
DRIVER := 580# the oldest NVIDIA driver that runs CUDA 13, which the wheels of requirements-gpu.lock are built for

# uv does not read pip's configuration: pass indexes and links on, unless uv has its own. Compile what Python may not at the first import.
LIKE_PIP = set -a; UV_INDEX_STRATEGY=unsafe-best-match; : $${PYTHONDONTWRITEBYTECODE:+$${UV_COMPILE_BYTECODE:=1}}; \
  eval "$$($(BIN)/python -m pip config list | sed -nE 's/\\n/ /g; /\.find-links=/s/ +/,/g; s/^.*\.find-links=/UV_FIND_LINKS=/; \
  s/^.*\.index-url=/UV_DEFAULT_INDEX=/; s/^.*\.extra-index-url=/UV_INDEX=/; s/^(UV_[A-Z_]+)=(.*)/\1=$${\1-\2}/p')"
INSTALL = $(LIKE_PIP); install() { $(BIN)/uv pip install -q --python $(BIN)/python "$$@" || $(BIN)/python -m pip install -qq "$$@"; }; install --no-deps
or_stop = || { echo "$(1)"; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help install resolve demo test quick browser gpu check fuzz chaos bench bench-env clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP) ## set up the environment, no more

$(STAMP): $(SET)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' $(call or_stop,python: 3.11 or later is needed (got $$($(PYTHON) -V)); make PYTHON=python3.12 ...)
	@command -v $(firstword $(CC)) >/dev/null $(call or_stop,compiler: a C compiler is needed (got no $(CC)); install gcc)
	@$(if $(NVIDIA),test $(firstword $(subst ., ,$(NVIDIA))) -ge $(DRIVER) $(call or_stop,driver: too old for CUDA 13 (got $(NVIDIA)); install $(DRIVER) or later))
	@$(if $(NVIDIA),file=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include", "posix_prefix"))')/Python.h; test -f $$file \
	  $(call or_stop,headers: Triton needs Python.h to compile (got no $$file); install python3-dev))
	@free=$$(df -Pk $(dir $(VENV)) | awk 'END {print int($$4 / 1e6)}'); test $$free -ge $(DISK) \
	  $(call or_stop,disk: the $(DEVICE) set needs $(DISK) GB in $(dir $(VENV)) (got $$free GB); free some or name another folder: make VENV=DIR ...)
	@echo "installing the $(DEVICE) set into $(VENV) (once)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq $(UV) || echo "uv: not installed (see above); pip takes its place and takes minutes longer"
	@$(if $(NVIDIA),,torch=torch==2.13.0+cpu; { $(INSTALL) $$torch; } 2>/dev/null || { $(INSTALL) $$torch --extra-index-url https://download.pytorch.org/whl/cpu; })
	@$(INSTALL) $(SET:%=-r %)
	@$(if $(NVIDIA),$(BIN)/python -c 'import torch; exit(not torch.cuda.is_available())' $(call or_stop,torch: finds no GPU (got driver $(NVIDIA)); check CUDA_VISIBLE_DEVICES))
	@touch $@

resolve: $(STAMP) ## does requirements-gpu.lock fit requirements.txt?
	@cp requirements-gpu.lock $(VENV)/resolved.lock
	@$(LIKE_PIP); UV_INDEX= UV_FIND_LINKS= $(BIN)/uv pip compile -q requirements.txt -o $(VENV)/resolved.lock --no-header --no-annotate \
	  --only-binary :all: --python-version 3.12 --python-platform x86_64-manylinux_2_31
	@diff requirements-gpu.lock $(VENV)/resolved.lock $(call or_stop,lock: does not fit (see above); cp $(VENV)/resolved.lock requirements-gpu.lock)
	@echo "requirements-gpu.lock fits requirements.txt: $$(grep -c == requirements-gpu.lock) packages"

demo: $(STAMP) ## the main job on a bare machine: GRPO against Band on the synthetic task, with a table and a picture
	@$(BIN)/python demo.py

# Triton in a folder of its own: on a CPU tests alone use it, to interpret the kernels that a GPU would run.
$(VENV)/triton: $(STAMP)
	@rm -rf $@ && { $(INSTALL) --target $@ triton==3.7.1; }

test: $(STAMP) $(VENV)/triton ## all tests, on all cores
	@$(BIN)/python -m pytest -n auto --dist worksteal --durations=10

quick: $(STAMP) ## tests without the slow ones
	@$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" --durations=10

browser: $(STAMP) ## tests of the page in a real browser; installs Chromium where apt is
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null \
	  || { command -v apt-get >/dev/null || { echo "no Chromium and no apt-get here: install Chromium by hand"; exit 1; }; \
	       root=$$(test $$(id -u) = 0 || echo sudo); $$root apt-get update -qq && $$root apt-get install -y -qq --no-install-recommends chromium; }
	@$(BIN)/python -m pytest -rs tests/eval/test_report.py

gpu: $(STAMP) ## the acceptance on an NVIDIA GPU (docs/gpu.md); PART=kernels, engine, training or two_gpus
	@$(BIN)/python -m pytest -v -rs --tb=short --durations=10 $(if $(PART),tests/gpu/test_$(PART).py,tests/gpu)

check: $(STAMP) ## lint, format, types
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

fuzz: $(STAMP) ## the verifier under two minutes of random input
	@$(BIN)/python -m rewards.fuzz --minutes 2

chaos: $(STAMP) ## runs killed, damaged and starved, then resumed and compared bit for bit
	@$(BIN)/python -m bench.chaos --runs 20 --seed 0

bench: $(STAMP) ## operator, log-prob memory, verifier, whole step
	@$(BIN)/python -m bench.band
	@$(BIN)/python -m bench.memory
	@$(BIN)/python -m bench.verifier
	@$(BIN)/python -m bench.step

bench-env: $(STAMP) ## an environment with TRL, for python -m bench.step --trl
	@test -x .venv.bench/bin/python || $(PYTHON) -m venv .venv.bench
	@echo "$(CURDIR)/$(VENV)/lib/$$($(BIN)/python -c "import sys; print(f'python{sys.version_info[0]}.{sys.version_info[1]}')")/site-packages" > $$(ls -d .venv.bench/lib/python*/site-packages)/ours.pth
	@.venv.bench/bin/python -m pip install -qq --no-deps trl==1.16.0

clean: ## remove the environment; runs stay
	rm -rf $(VENV)
