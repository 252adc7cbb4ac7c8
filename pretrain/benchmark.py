"""Training throughput of the four quickstart models, or of the three modes of top-K, side by side in one run.

Steps of the variants alternate, so that whatever else the machine does hits all of them alike; the figure to read is the
ratio to the first variant. Tokens are random: no data is needed. Prints one JSON object.

    python -m pretrain.benchmark                        dense, qsparse, bitnet and both, data parallel
    python -m pretrain.benchmark --modes --tensor 2     what qsparse.mode costs on tensor-parallel ranks
"""

import argparse
import json
import os
import statistics
import sys
import time
from typing import TYPE_CHECKING

from data_tools.arguments import Parser, named_path
from pretrain.quickstart import CONFIGS, RUNS, torchrun

if TYPE_CHECKING:
    from pretrain.config import PretrainConfig

WARM_UP_ROUNDS = 3
VOCABULARY = 1024


def main(args: list[str] | None = None) -> int:
    parser = Parser(prog="python -m pretrain.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="measured steps of each variant (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks among them (default: %(default)s)")
    parser.add_argument("--modes", action="store_true", help="compare groups, block, global and dense instead of the quickstart's models")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", type=named_path, help="also write the JSON to this file")
    options = parser.parse_args(args)
    if found := problems(options):
        parser.error("; ".join(found))
    if "WORLD_SIZE" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.execv(sys.executable, [*torchrun(options.processes), "-m", "pretrain.benchmark", *(sys.argv[1:] if args is None else args)])
    return measure(options)


def variants(modes: bool, tensor: int) -> dict[str, "PretrainConfig"]:
    """Configurations to compare; figures are given relative to the first."""
    from pretrain.config import parse

    files = dict.fromkeys(("groups", "block", "global"), "qsparse") | {"dense": "dense"} if modes else {name: name for name in RUNS}
    layout = ["--parallel.tensor", str(tensor)]
    return {
        name: parse(["--config", str(CONFIGS / f"tiny_{file}.yaml"), *layout, *(["--qsparse.mode", name] if file != name else [])])
        for name, file in files.items()
    }


def problems(options: argparse.Namespace) -> list[str]:
    """Why these models cannot be spread so, in words."""
    from megatron_qsparse.config import problems as sparsity_problems
    from megatron_qsparse.models.accounting import projection_widths
    from megatron_qsparse.models.presets import apply_preset

    if options.tensor < 1 or options.processes % options.tensor:
        return [f"--processes {options.processes} is not a multiple of --tensor {options.tensor}"]
    found = []
    for name, config in variants(options.modes, options.tensor).items():
        model = apply_preset(config.model, tokenizer_vocab_size=VOCABULARY)
        widths = projection_widths(model)
        found += [f"{name}: {text}" for text in sparsity_problems(config.qsparse, config.bitnet, widths, model.num_layers, options.tensor)]
    return found


def measure(options: argparse.Namespace) -> int:
    """One rank's part."""
    from pretrain.libraries import prepare

    prepare(options.device)
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_qsparse.models.presets import apply_preset
    from megatron_qsparse.parallel import groups
    from pretrain.hardware import choose_device
    from pretrain.run import build_engine
    from pretrain.validate import Validated

    configs = variants(options.modes, options.tensor)
    first = next(iter(configs.values()))
    device = choose_device(options.device)
    groups.initialize(first.parallel, device, seed=0)
    data_parallel = parallel_state.get_data_parallel_world_size()
    engines = {}
    for name, config in configs.items():
        model = apply_preset(config.model, tokenizer_vocab_size=VOCABULARY)
        engines[name] = build_engine(Validated(config, model, None, data_parallel, 1), device)
    generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    shape = (first.train.micro_batch_size, first.data.sequence_length + 1)
    seconds = {name: [] for name in configs}
    for round_number in range(WARM_UP_ROUNDS + options.rounds):
        for name, engine in engines.items():
            batch = torch.randint(0, VOCABULARY, shape, generator=generator).to(device)
            dist.barrier()
            started = time.perf_counter()
            engine.train_step(iter([batch]), 1, lr=1e-4, weight_decay=0.1)
            if round_number >= WARM_UP_ROUNDS:
                seconds[name].append(time.perf_counter() - started)
    if dist.get_rank() == 0:
        layout = {"device": str(device), "processes": dist.get_world_size(), "tensor_parallel": options.tensor}
        result = layout | summary(seconds, tokens_per_step=shape[0] * (shape[1] - 1) * data_parallel)
        text = json.dumps(result, indent=1)
        print(text)
        if options.output is not None:
            options.output.write_text(text + "\n")
    groups.destroy()
    return 0


def summary(seconds: dict[str, list[float]], tokens_per_step: int) -> dict:
    """The ratio is the median over rounds of the first variant's step time / this variant's step time in the same round."""
    baseline = next(iter(seconds))
    runs = {}
    for name, values in seconds.items():
        ratios = [reference / own for reference, own in zip(seconds[baseline], values, strict=True)]
        runs[name] = {
            "tokens_per_s": round(tokens_per_step / statistics.median(values)),
            "milliseconds_per_step": round(1000 * statistics.median(values), 1),
            f"ratio_to_{baseline}": round(statistics.median(ratios), 3),
        }
    return {"rounds": len(seconds[baseline]), "tokens_per_step": tokens_per_step, "runs": runs}


if __name__ == "__main__":
    sys.exit(main())
