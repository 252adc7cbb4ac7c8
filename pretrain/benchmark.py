"""Training throughput of the four quickstart models, side by side in one run.

Steps of the variants alternate, so that whatever else the machine does hits all of them alike; the figure to read is the
ratio to dense. Tokens are random: no data is needed. Prints one JSON object.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

from pretrain.quickstart import CONFIGS, RUNS, torchrun

WARM_UP_ROUNDS = 3
VOCABULARY = 1024


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain.benchmark", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="measured steps of each variant (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="data-parallel processes (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    options = parser.parse_args(args)
    if "WORLD_SIZE" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.execv(sys.executable, [*torchrun(options.processes), "-m", "pretrain.benchmark", *(sys.argv[1:] if args is None else args)])
    return measure(options)


def measure(options: argparse.Namespace) -> int:
    """One rank's part."""
    from pretrain.libraries import prepare

    prepare(options.device)
    import torch
    import torch.distributed as dist

    from megatron_qsparse.models.presets import apply_preset
    from megatron_qsparse.parallel import groups
    from pretrain.config import parse
    from pretrain.hardware import choose_device
    from pretrain.run import build_engine
    from pretrain.validate import Validated

    configs = {name: parse(["--config", str(CONFIGS / f"tiny_{name}.yaml")]) for name in RUNS}
    device = choose_device(options.device)
    groups.initialize(configs["dense"].parallel, device, seed=0)
    world = dist.get_world_size()
    engines = {}
    for name, config in configs.items():
        model = apply_preset(config.model, tokenizer_vocab_size=VOCABULARY)
        engines[name] = build_engine(Validated(config, model, None, world, 1), device)
    first = configs["dense"]
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (first.train.micro_batch_size, first.data.sequence_length + 1)
    seconds = {name: [] for name in RUNS}
    for round_number in range(WARM_UP_ROUNDS + options.rounds):
        for name, engine in engines.items():
            batch = torch.randint(0, VOCABULARY, shape, generator=generator).to(device)
            dist.barrier()
            started = time.perf_counter()
            engine.train_step(iter([batch]), 1, lr=1e-4, weight_decay=0.1)
            if round_number >= WARM_UP_ROUNDS:
                seconds[name].append(time.perf_counter() - started)
    if dist.get_rank() == 0:
        _report(seconds, tokens=shape[0] * (shape[1] - 1) * world, device=device, world=world, output=options.output)
    groups.destroy()
    return 0


def _report(seconds: dict[str, list[float]], tokens: int, device, world: int, output: Path | None) -> None:
    """The ratio is the median over rounds of dense step time / this variant's step time in the same round."""
    result = {"device": str(device), "processes": world, "rounds": len(seconds["dense"]), "tokens_per_step": tokens, "runs": {}}
    for name, values in seconds.items():
        ratios = [dense / own for dense, own in zip(seconds["dense"], values, strict=True)]
        result["runs"][name] = {
            "tokens_per_s": round(tokens / statistics.median(values)),
            "ratio_to_dense": round(statistics.median(ratios), 3),
        }
    text = json.dumps(result, indent=1)
    print(text)
    if output is not None:
        output.write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
