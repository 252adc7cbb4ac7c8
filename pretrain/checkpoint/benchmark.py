"""What checkpoints cost a run: synchronous and asynchronous saves in turn, between training steps of one model.

Tokens are random: no data is needed. Prints one JSON object; times are seconds, medians over the rounds. `stall` is how long
training waits for an asynchronous save, `next_3_steps` the mean of the three steps behind it, while it is being written. `load`
reads what was just written, so from the page cache: the work besides the disk.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from data_tools.arguments import Parser, named_path
from pretrain.quickstart import torchrun

WARM_UP_STEPS = 3
QUIET_STEPS = 4
"""Measured between two saves, with none under way."""


def main(args: list[str] | None = None) -> int:
    parser = Parser(prog="python -m pretrain.checkpoint.benchmark", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="data-parallel processes (default: %(default)s)")
    parser.add_argument("--stage", type=int, default=1, choices=(1, 2, 3), help="ZeRO stage (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="of 512 wide, 3.9 M parameters each (default: %(default)s)")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step on each rank (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--folder", type=named_path, help="where to write the checkpoints, which are removed again (default: a temporary one)"
    )
    options = parser.parse_args(args)
    if "WORLD_SIZE" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        command = [*torchrun(options.processes), "-m", "pretrain.checkpoint.benchmark", *(sys.argv[1:] if args is None else args)]
        os.execv(sys.executable, command)
    return measure(options)


def measure(options: argparse.Namespace) -> int:
    """One rank's part."""
    from pretrain.libraries import prepare

    prepare(options.device)
    import torch.distributed as dist

    from megatron_qsparse.config import ParallelConfig
    from megatron_qsparse.parallel import groups
    from pretrain.hardware import choose_device

    device = choose_device(options.device)
    groups.initialize(ParallelConfig(), device, seed=0)
    with tempfile.TemporaryDirectory(dir=options.folder) as own:
        folder = [own]
        dist.broadcast_object_list(folder, src=0)
        result = _Benchmark(options, device, Path(folder[0])).run()
        dist.barrier()
    if dist.get_rank() == 0:
        print(json.dumps({"device": str(device), "processes": dist.get_world_size(), "zero_stage": options.stage, **result}, indent=1))
    groups.destroy()
    return 0


class _Benchmark:
    def __init__(self, options: argparse.Namespace, device, folder: Path):
        import torch
        import torch.distributed as dist

        from megatron_qsparse.config import BitNetConfig, ParallelConfig, QSparseConfig
        from megatron_qsparse.models.config import ModelConfig
        from megatron_qsparse.models.gpt import build_model
        from megatron_qsparse.models.presets import apply_preset
        from megatron_qsparse.parallel.checkpoint import Saver
        from megatron_qsparse.parallel.zero import AdamSettings, ZeroEngine
        from pretrain.checkpoint.directory import CheckpointDirectory

        shape = ModelConfig(num_layers=options.layers, hidden_size=512, ffn_hidden_size=1792, num_attention_heads=8, vocab_size=16384)
        model = build_model(
            apply_preset(shape, None), QSparseConfig(keep=0.4), BitNetConfig(), ParallelConfig(),
            sequence_length=128, dtype=torch.bfloat16, seed=0, device=device,
        )  # fmt: skip
        self.parameters = sum(param.numel() for param in model.parameters())
        adam = AdamSettings(beta1=0.9, beta2=0.95, eps=1e-8, clip=1.0)
        self.engine = ZeroEngine(model, stage=options.stage, adam=adam, micro_batch_size=1, sequence_length=128)
        self.saver, self.directory = Saver(self.engine), CheckpointDirectory(folder / "checkpoints", keep_last=1)
        self.rounds, self.micro_batches = options.rounds, options.micro_batches
        self.generator, self.device, self.step = torch.Generator().manual_seed(dist.get_rank()), device, 0

    def run(self) -> dict:
        from pretrain.checkpoint.directory import STATE_NAME

        for _ in range(WARM_UP_STEPS):
            self._step()
        self._save(wait=True)
        seconds: dict[str, list[float]] = {name: [] for name in ("step", "sync_save", "stall", "async_save", "next_3_steps")}
        for _ in range(self.rounds):
            seconds["step"] += [self._step() for _ in range(QUIET_STEPS)]
            seconds["sync_save"].append(self._save(wait=True))
            seconds["step"] += [self._step() for _ in range(QUIET_STEPS)]
            seconds["stall"].append(self._save(wait=False))
            seconds["next_3_steps"].append(statistics.mean(self._step() for _ in range(3)))
            while (report := self.saver.poll()) is None:
                self._step()
            seconds["async_save"].append(report.total_s)
        newest = self.directory.complete()[-1] / STATE_NAME
        seconds["load"] = [self._load(newest) for _ in range(self.rounds)]
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        return {
            "parameters": self.parameters, "rounds": self.rounds, "bytes_written_by_rank_0": report.nbytes,
            "seconds": {name: round(value, 3) for name, value in medians.items()},
            "stall_to_sync_save": round(medians["stall"] / medians["sync_save"], 3),
            "next_3_steps_to_median_step": round(medians["next_3_steps"] / medians["step"], 3),
            "worst_next_3_steps_to_median_step": round(max(seconds["next_3_steps"]) / medians["step"], 3),
        }  # fmt: skip

    def _step(self) -> float:
        import torch

        batches = [torch.randint(0, 16384, (1, 129), generator=self.generator).to(self.device) for _ in range(self.micro_batches)]
        started = self._now()
        self.engine.train_step(iter(batches), len(batches), lr=1e-4, weight_decay=0.1)
        self.step += 1
        return self._now() - started

    def _save(self, wait: bool) -> float:
        from megatron_qsparse.parallel.checkpoint import Output
        from pretrain.checkpoint.directory import STATE_NAME

        step, partial = self.step, self.directory.partial(self.step)
        output = Output(
            directory=partial / STATE_NAME, prepare=lambda: self.directory.begin(step),
            publish=lambda files: self.directory.publish(partial, {f"{STATE_NAME}/{name}": record for name, record in files.items()}),
        )  # fmt: skip
        started = self._now()
        self.saver.start([output])
        if wait:
            self.saver.wait()
        return self._now() - started

    def _load(self, state: Path) -> float:
        from megatron_qsparse.parallel import checkpoint

        started = self._now()
        checkpoint.load(self.engine, state)
        return self._now() - started

    def _now(self) -> float:
        """After all ranks have come here."""
        import torch.distributed as dist

        dist.barrier()
        return time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
