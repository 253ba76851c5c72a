# make demo    set up, train the synthetic task with GRPO's fixed clip and with Band, compare   (two to three minutes)
# make test    set up, run the tests
# make help    everything else
#
# Both work on a fresh machine with git, make, Python 3.11 or later and a C compiler. What is installed goes to .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NVIDIA := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
DEVICE := $(if $(NVIDIA),gpu,cpu)
REQUIREMENTS := $(if $(filter gpu,$(DEVICE)),requirements.txt,requirements-cpu.txt)
STAMP := $(VENV)/.installed-$(DEVICE)
TORCH_CPU := torch==2.13.0+cpu
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
DRIVER := 580# the oldest NVIDIA driver that runs CUDA 13, which the wheels of requirements.txt are built for
TRITON := triton==3.7.1# the release that torch 2.13.0 takes on a GPU

.DEFAULT_GOAL := help
.PHONY: help install resolve demo test quick browser gpu check fuzz chaos bench bench-env clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP) ## set up the environment, no more

$(STAMP): $(REQUIREMENTS) requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=python3.12 ..."; exit 1; }
	@echo "installing the $(DEVICE) set into $(VENV) (once; $(if $(filter gpu,$(DEVICE)),several GB,about two minutes))"
ifeq ($(DEVICE),gpu)
	@test "$(firstword $(subst ., ,$(NVIDIA)))" -ge $(DRIVER) \
	  || { echo "NVIDIA driver $(NVIDIA) is too old for wheels built for CUDA 13: install $(DRIVER) or later"; exit 1; }
endif
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(DEVICE),gpu)
	@$(BIN)/python -m pip install -qq -r requirements.txt -r requirements-dev.txt
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
	  || { echo "nvidia-smi works (driver $(NVIDIA)), torch sees no GPU: is CUDA_VISIBLE_DEVICES empty, or the driver older than $(DRIVER)?"; exit 1; }
else
	@# The CPU wheel from where pip is configured to look, else from PyTorch's own index.
	@$(BIN)/python -m pip install -qq --no-deps $(TORCH_CPU) 2>/dev/null \
	  || $(BIN)/python -m pip install -qq --no-deps $(TORCH_CPU) --index-url $(TORCH_CPU_INDEX)
	@$(BIN)/python -m pip install -qq --no-deps -r requirements-cpu.txt
	@$(BIN)/python -m pip install -qq -r requirements-dev.txt
endif
	@touch $@

# Asks the package index alone, for the Python and the platform of a GPU machine; installs nothing.
resolve: $(STAMP) ## does requirements.txt resolve for a GPU machine?
	@$(BIN)/python -m pip install -q --dry-run --ignore-installed --target $(VENV)/nowhere --only-binary=:all: --python-version 3.12 \
	  $(foreach minor,$(shell seq 5 39),--platform manylinux_2_$(minor)_x86_64) --platform manylinux1_x86_64 --platform manylinux2014_x86_64 --platform any \
	  --report $(VENV)/resolved.json antlr4-python3-runtime==4.13.2 -r requirements.txt 2>$(VENV)/resolve.log || { grep -v WARNING $(VENV)/resolve.log; exit 1; }
	@$(BIN)/python -c 'import json; r = json.load(open("$(VENV)/resolved.json"))["install"]; print(len(r), "packages resolve:", *("{name}=={version}".format(**p["metadata"]) for p in r if p["requested"]))'

demo: $(STAMP) ## the main job on a bare machine: GRPO against Band on the synthetic task, with a table and a picture
	@$(BIN)/python demo.py

# Triton in a folder of its own: on a CPU tests alone use it, to interpret the kernels that a GPU would run.
$(VENV)/triton: $(STAMP)
	@rm -rf $@ && $(BIN)/python -m pip install -qq --no-deps --target $@ $(TRITON)

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
	@PYTHONPATH=. $(BIN)/python tests/fuzzing.py --minutes 2

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
