"""20 steps of the tiny qsparse and bitnet_qsparse models on one GPU over NCCL, against the CPU's losses.

Makes its own small corpus. Both devices start from the same weights and read the same samples, so their losses may differ by
the rounding of bf16 products only, which flips a few near-ties of masks and codes. Exit status 1 where a loss differs by more.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from data_tools.arguments import Parser, named_path
from pretrain.quickstart import CONFIGS, data_commands, torchrun

RUNS = ("qsparse", "bitnet_qsparse")
STEPS = 20
TOLERANCE_NAT = 0.05
"""Largest difference of a step's loss; the losses fall by about 2 nat in these steps, and seeds differ by more than this."""


def main(args: list[str] | None = None) -> int:
    parser = Parser(prog="python -m pretrain.gpu_smoke", description=__doc__)
    parser.add_argument("--output", type=named_path, help="write the losses and differences to this JSON file")
    options = parser.parse_args(args)

    import torch

    if not torch.cuda.is_available():
        print("error: torch finds no CUDA device, so there is nothing to compare with the CPU", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        for command in data_commands(Path(folder)):
            subprocess.run(command, check=True)
        results = {name: {device: losses(Path(folder), name, device) for device in ("cpu", "cuda")} for name in RUNS}
    worst = 0.0
    for name, result in results.items():
        result["largest_difference"] = max(abs(a - b) for a, b in zip(result["cpu"], result["cuda"], strict=True))
        worst = max(worst, result["largest_difference"])
        print(f"{name}: largest difference of {STEPS} losses {result['largest_difference']:.4f} nat (at most {TOLERANCE_NAT})")
    if options.output is not None:
        options.output.write_text(json.dumps({"device": torch.cuda.get_device_name(), "runs": results}, indent=1) + "\n")
    return 0 if worst <= TOLERANCE_NAT else 1


def losses(folder: Path, name: str, device: str) -> list[float]:
    """Loss of each step of one process on one device."""
    run = folder / "runs" / f"{name}_{device}"
    command = [
        *(*torchrun(processes=1), "-m", "pretrain.train"),
        *("--config", str(CONFIGS / f"tiny_{name}.yaml"), "--data.path", str(folder / "shards"), "--output_dir", str(run)),
        *("--device", device, "--train.steps", str(STEPS), "--train.log_interval", "1", "--schedule.warmup_steps", "10"),
        *("--train.deterministic", "true", "--tracking.enabled", "false"),
    ]
    subprocess.run(command, check=True, env=dict(os.environ, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "2")))
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [entry["train/loss"] for entry in entries if "train/loss" in entry]


if __name__ == "__main__":
    sys.exit(main())
