"""What a GPU does differently, rehearsed on a CPU.

vLLM's second model runner with interpreted kernels, its configuration for an H200, and tensors that have a
shape and a dtype and no memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gradient_script
import pytest
import torch
from accelerate import Accelerator
from as_on_gpu import TRITON
from launching import ROOT, metrics
from tiny import make_model, policy_options, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import train
from bandpo.logprobs import _product
from configs import load
from configs.schema import Config, Plan
from trainer.policy import Policy

needs_triton = pytest.mark.skipif(not TRITON.is_dir(), reason="needs Triton in a folder of its own: make .venv/triton")
TESTS = ROOT / "tests"


def as_on_gpu(*line: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{TESTS}"}
    command = [sys.executable, "tests/as_on_gpu.py", *map(str, line)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_second_runner_samples_as_the_model_says_and_takes_new_weights(tied: bool, tmp_path: Path):
    models = [make_model(tmp_path / str(seed), tied=tied, seed=seed) for seed in (0, 1)]
    done = as_on_gpu("tests/engine_script.py", *models)
    found = json.loads(done.stdout.split("RESULT ")[1])
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner"  # the second; the first is v1.worker.cpu_model_runner
    assert found["largest_id"] < 22
    assert found["gap_before"] < 1e-4 and found["gap_after_sync"] < 1e-4 < found["gap_to_old_weights"]
    assert all(found["same_in_another_batch"]) and found["different_seeds_differ"]
    # Matrices are not repacked here, so that every unfused weight is compared after a sync, the embedding included.
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(found["compared"])


@needs_triton
@pytest.mark.slow
def test_training_by_the_road_of_a_gpu(tmp_path: Path):
    """Two steps, the second on weights that the first handed over: trainer and engine agree on every token."""
    make_model(tmp_path / "model", tied=True)
    (tmp_path / "odd.py").write_text("def score(completion, gold):\n    return len(completion) % 2\n")
    keys = {
        "config": "demo_band",
        "model": tmp_path / "model",
        "output_dir": tmp_path,
        "reward": f"{tmp_path / 'odd.py'}:score",
        **{"prompts_per_step": 4, "samples_per_prompt": 4, "max_response_tokens": 8, "max_steps": 2, "lr": 1e-2},
        **{"minibatches": 2, "epochs": 1, "eval_every": 0, "wandb": "disabled", "verifier_workers": 1},
    }
    as_on_gpu("train.py", *(word for key, value in keys.items() for word in (f"--{key}", value)))
    first, second = metrics(tmp_path / "demo_band")
    assert first["optim/grad_norm"] > 0 and abs(second["train/entropy"] - first["train/entropy"]) > 1e-3
    assert 0 < first["rollout/logprob_diff_max"] < 1e-4 and 0 < second["rollout/logprob_diff_max"] < 1e-4


CONFIGURATION = """
import json, sys, types
sys.path.insert(0, {triton!r})
sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("the CUDA build's kernels")
import vllm.platforms
from vllm.platforms.cuda import DeviceCapability, NonNvmlCudaPlatform

class H200(NonNvmlCudaPlatform):
    get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
    get_device_name = classmethod(lambda cls, device_id=0: "NVIDIA H200")
    get_device_total_memory = classmethod(lambda cls, device_id=0: 141 << 30)
    device_count = classmethod(lambda cls: 1)
    is_cumem_allocator_available = lambda self: True

vllm.platforms._current_platform = H200()
import vllm.config.vllm
vllm.config.vllm.HAS_TRITON = True
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.worker.gpu.sample.logits_processor.loader import build_custom_logits_processors_params_validator
from trainer.rollout import EngineOptions, engine_arguments

found = []
for eager in (False, True):
    options = EngineOptions("vllm", "bfloat16", 22, 32, 8, 0.6, 1, 1, {{"enforce_eager": eager}}, False)
    config = EngineArgs(**engine_arguments({model!r}, options, world=1, device="cuda:0")).create_engine_config()
    build_custom_logits_processors_params_validator(config.model_config.logits_processors)  # refuses the first runner's
    found.append({{
        "second": config.use_v2_model_runner,
        "sleep": config.model_config.enable_sleep_mode,
        "graphs": config.compilation_config.cudagraph_mode.name,
        "sequences": config.scheduler_config.max_num_seqs,
        "share": config.cache_config.gpu_memory_utilization,
    }})
print("RESULT " + json.dumps(found))
"""


@pytest.mark.slow
def test_vllm_accepts_our_settings_for_an_h200(tmp_path: Path):
    """vLLM's own configuration and validators on the platform class of CUDA, told that it is an H200."""
    model = make_model(tmp_path / "model", tied=True)
    code = CONFIGURATION.format(triton=str(TRITON), model=str(model))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    graphs, eager = json.loads(done.stdout.split("RESULT ")[1])
    assert graphs["second"] and eager["second"]  # the runner that a GPU takes
    assert graphs["sleep"] and graphs["share"] == 0.6 and graphs["sequences"] == 8
    assert graphs["graphs"] == "FULL_AND_PIECEWISE" and eager["graphs"] == "NONE"


def test_products_off_the_cpu_keep_float32():
    """By dtype alone, on the meta device. A CPU rounds to bfloat16 and back: it has no kernel that does not."""
    left, right = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((4, 8), (8, 22)))
    seen: list[torch.dtype] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            seen.append(result.dtype)
            return result

    with Recorder():
        logits = _product(left, right)
    assert logits.shape == (4, 22) and seen == [torch.float32]


class Reads(TorchDispatchMode):
    """Counts the operators for which a host waits for a GPU: values that are read, and shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [each for each in (args[1] if name == "index" else []) if each is not None and each.dtype == torch.bool]
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "repeat_interleave"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_an_update_reads_the_device_once_per_micro_batch(tmp_path: Path):
    """Whether a backward pass is needed, and the norm; the pass for old log-probs reads nothing."""
    tiny_model(tied=True).save_pretrained(tmp_path)
    accelerator = Accelerator(cpu=True)
    policy = Policy.load(str(tmp_path), policy_options(attention="auto"), accelerator)
    keys = {"rule": "fixed", "micro_batch_tokens": 64, "minibatches": 2, "max_rollout_kl": 1e9}  # band reads on a CPU
    keys |= {"prompts_per_step": 4, "samples_per_prompt": 4, "max_prompt_tokens": 8, "max_response_tokens": 24}
    cfg = load(Config, ["--config", "demo_band.yaml", *(f"--{key}={value}" for key, value in keys.items())])
    recorder = gradient_script.Recorder(policy.parameters(), lr=0.0)
    run = gradient_script.part_of_a_run(cfg, Plan(cfg), policy, recorder, accelerator)
    minibatches = train.make_minibatches(run, gradient_script.samples())
    batches = [batch for minibatch in minibatches for batch in minibatch]
    assert len(batches) > 4
    with torch.no_grad(), Reads() as reads:
        for batch in batches:
            policy(batch)
    assert reads.found == []
    with Reads() as reads:
        train.update_policy(run, minibatches)
    assert reads.found == ["_local_scalar_dense"] * len(batches) * cfg.epochs
