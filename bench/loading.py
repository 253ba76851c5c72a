"""Host memory while a policy is loaded and cut over processes.

    ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 -m bench.loading [--size 200m]

Random weights, stored in bfloat16 as models come. For each rank, without pages of files, which ranks share: the largest
resident size above what it had before, and the size after. On a CPU what is kept counts too: the whole model with ddp,
a share of it with fsdp2.
"""

import argparse
import gc
import subprocess
import sys
import tempfile
import threading
import time

import psutil
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from trainer.policy import Policy, PolicyOptions

GIB = 2**30
MAKE = """
import sys
from pathlib import Path
from transformers import AutoModelForCausalLM
from bench.workload import make_workload
folder, size = sys.argv[1:]
make_workload(Path(folder), size, 8, 16)
AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="200m", help="a name of bench.workload.SIZES")
    parser.add_argument("--sharding", default="fsdp2")
    options = parser.parse_args()
    accelerator = Accelerator()
    with tempfile.TemporaryDirectory() as folder:
        path = [folder]
        if accelerator.is_main_process:  # made by another process, whose memory is not counted
            subprocess.run([sys.executable, "-c", MAKE, folder, options.size], check=True)
        broadcast_object_list(path)
        gc.collect()
        accelerator.wait_for_everyone()
        used = own_memory()
        peak = Peak()
        policy = Policy.load(path[0], policy_options(options.sharding), accelerator)
        found = [(accelerator.process_index, peak.stop() - used, own_memory() - used)]
        count = sum(p.numel() for p in policy.parameters())
        for rank, most, after in gather_object(found):
            if accelerator.is_main_process:
                print(
                    f"rank {rank}: {most / GIB:.2f} GiB at most, {after / GIB:.2f} kept; {4 * count / GIB:.2f} in all"
                )
        accelerator.end_training()


def own_memory() -> int:
    """Resident bytes of this process that are no pages of a mapped file."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def policy_options(sharding: str) -> PolicyOptions:
    return PolicyOptions(
        sharding=sharding,
        precision="float32",
        attention="sdpa",
        gradient_checkpointing=False,
        compile=False,
        temperature=1.0,
        vocab_size=8,
        chunk_tokens=16,
        logprob_kernel="chunked",
        trust_remote_code=False,
    )


class Peak(threading.Thread):
    """The largest resident size of this process until `stop`; the kernel's own high-water mark cannot be reset here."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.ended = 0, False
        self.start()

    def run(self) -> None:
        while not self.ended:
            self.most = max(self.most, own_memory())
            time.sleep(0.002)

    def stop(self) -> int:
        self.ended = True
        self.join()
        return self.most


if __name__ == "__main__":
    main()
