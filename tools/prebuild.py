"""Compile beforehand what training compiles when it first runs, for machines without a compiler, and prove that nothing is left.

A few steps of each kind of model are trained with no compiler to be found. Where that fails, or compiles something all the same,
the steps are trained with the compilers, which fills the caches, and the proof is taken again.
"""

import argparse
import compileall
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ("dense", "qsparse", "bitnet", "bitnet_qsparse", "moe_qsparse")
CACHES = {"TORCH_EXTENSIONS_DIR": "torch_extensions", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
"""Environment variable -> its folder in the cache: C++ and CUDA extensions (DeepSpeed's too), Triton kernels, torch.compile."""
COMPILERS = (
    *("cc", "gcc", "g++", "c++", "c89", "c99", "clang", "clang++", "icx", "icpx", "nvcc", "hipcc", "ptxas"),
    *("ld", "as", "ninja", "make", "cmake"),
)
STEPS = 2
TIMEOUT_S = 900


class Failed(Exception):
    """The message says what did not compile or run."""


def main(args: list[str] | None = None) -> int:
    """Exit status 0 where nothing is left to compile on a machine like this one, else 1."""
    parser = argparse.ArgumentParser(prog="make prebuild", description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".prebuilt"), help="folder for what is compiled (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS, help="models to train (default: all)")
    options = parser.parse_args(args)
    try:
        _main(options.cache.absolute(), options.variants)
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _main(cache: Path, variants: list[str]) -> None:
    import torch

    started = time.monotonic()
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    where = torch.cuda.get_device_name() if devices else "CPU"
    print(f"environment: {sys.prefix}, torch {torch.__version__}, {where}")
    _bytecode()
    folders = {variable: Path(os.environ.get(variable) or cache / name) for variable, name in CACHES.items()}
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(Path(scratch), folders, processes=min(2, devices) if devices else 2)
        trainer.make_data()
        compiled = [variant for variant in variants if trainer.prebuild(variant)]
    if compiled:
        print(f"compiled for {', '.join(compiled)}; afterwards all trained {STEPS} steps with no compiler to be found. For your jobs:")
        for variable, folder in folders.items():
            print(f"  export {variable}={folder}  # {len(contents(folder))} files")
    else:
        print(
            f"nothing is compiled on this device ({where}): {len(variants)} models trained {STEPS} steps each with no compiler to be found"
        )
    if not devices:
        print("no GPU here: what a GPU's first step compiles can only be compiled, and looked for, on a machine with one: run this there")
    print(f"done in {time.monotonic() - started:.0f} s")


def _bytecode() -> None:
    """The project's own; pip and make install see to that of the packages."""
    missing = [
        name for name in ("megatron_qsparse", "pretrain", "data_tools") if not compileall.compile_dir(ROOT / name, quiet=2, workers=0)
    ]
    if missing:
        print(f"bytecode: {', '.join(missing)} in {ROOT} cannot be compiled in place (read-only?); Python does without, at each start")
    else:
        print(f"bytecode: {ROOT}/*/__pycache__")


def contents(folder: Path) -> set[Path]:
    """Files below, less what libraries write there besides compiled code."""
    return {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".lock", ".json") and path.name != "lock"}


@dataclass
class Trainer:
    """Trains small models in processes of their own. folders: environment variable -> cache."""

    scratch: Path
    folders: dict[str, Path]
    processes: int
    probes: set[str] = field(default_factory=set)
    """Calls of compilers that were found to be without consequence."""

    def make_data(self) -> None:
        """Shards of a piece of the standard library."""
        corpus = self.scratch / "corpus.jsonl"
        texts = [path.read_text(errors="replace")[:2000] for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]]
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        tool = ["-m", "data_tools"]
        tokenizer, shards = str(self.scratch / "tokenizer"), str(self.scratch / "shards")
        for command in (
            [*tool, "train-tokenizer", "--input", str(corpus), "--vocab-size", "512", "--output", tokenizer],
            [*tool, "tokenize", "--input", str(corpus), "--tokenizer", tokenizer, "--output", shards, "--validation-fraction", "0.3"],
        ):
            status, output, _ = self.run(command, hidden=True)
            if status:
                raise Failed(f"the data could not be made:\n{output}")

    def prebuild(self, variant: str) -> bool:
        """Whether anything had to be compiled. Raises Failed where something cannot be, or is left."""
        before = self._cached()
        started = time.monotonic()
        status, output, called = self.train(variant, hidden=True)
        if not status and called <= self.probes and self._cached() == before:
            print(f"  {variant}: {STEPS} steps, nothing compiled ({time.monotonic() - started:.0f} s)", flush=True)
            return False
        why = _end(output, lines=1) if status else f"asked for {', '.join(sorted({call.split()[0] for call in called - self.probes}))}"
        print(f"  {variant}: without compilers: {why}; training with them", flush=True)
        status, output, _ = self.train(variant, hidden=False)
        if status:
            raise Failed(f"{variant} does not train on this machine, compilers or not:\n{_end(output)}")
        filled = self._cached() - before
        status, output, called = self.train(variant, hidden=True)
        if status or self._cached() != before | filled:
            raise Failed(f"{variant} compiles at every start, so machines without a compiler cannot run it:\n{_end(output)}")
        # What is asked although it trains, with caches that stay as they are, is a question about the machine (DeepSpeed's import
        # looks for libaio by compiling a test, for example), whose answer may be no.
        self.probes |= called
        print(f"  {variant}: {STEPS} steps, {len(filled)} files compiled ({time.monotonic() - started:.0f} s)", flush=True)
        return bool(filled)

    def train(self, variant: str, hidden: bool) -> tuple[int, str, set[str]]:
        """Exit status, output, and the calls of compilers that came to nothing, without their paths."""
        run = self.scratch / f"{variant}_{time.monotonic_ns()}"
        command = [
            *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes), "-m", "pretrain.train"),
            *("--config", str(ROOT / "pretrain" / "configs" / f"tiny_{variant}.yaml"), "--data.path", str(self.scratch / "shards")),
            *("--output_dir", str(run), "--data.sequence_length", "64", "--train.micro_batch_size", "2", "--train.global_batch_size", "4"),
            *("--train.steps", str(STEPS), "--schedule.warmup_steps", "1", "--validation.samples", "4", "--tracking.enabled", "false"),
            *(("--parallel.expert", str(self.processes)) if variant.startswith("moe") else ()),
        ]
        return self.run(command, hidden)

    def run(self, command: list[str], hidden: bool) -> tuple[int, str, set[str]]:
        """python with these arguments. hidden: nothing is on PATH but things that take note of being called and fail."""
        environment = {**os.environ, **{variable: str(folder) for variable, folder in self.folders.items()}, "PYTHONPATH": str(ROOT)}
        environment.setdefault("OMP_NUM_THREADS", "1")
        traps, log = self.scratch / "traps", self.scratch / "called"
        log.write_text("")
        if hidden:
            traps.mkdir(exist_ok=True)
            for name in COMPILERS:
                (traps / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "{log}"\nexit 1\n')
                (traps / name).chmod(0o755)
            for name in ("CC", "CXX", "CUDACXX"):
                environment.pop(name, None)
            environment |= {"PATH": str(traps), "CUDA_HOME": str(self.scratch / "no_cuda_toolkit")}
        try:
            result = subprocess.run(
                [sys.executable, *command], env=environment, cwd=self.scratch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace", stdin=subprocess.DEVNULL, timeout=TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise Failed(f"no end within {TIMEOUT_S} s: {' '.join(command)}") from error
        called = {re.sub(r"/\S+", "FILE", line) for line in log.read_text().splitlines()}
        return result.returncode, result.stdout, called

    def _cached(self) -> set[Path]:
        return set().union(*(contents(folder) for folder in self.folders.values()))


def _end(output: str, lines: int = 15) -> str:
    return "\n".join(output.strip().splitlines()[-lines:])


if __name__ == "__main__":
    sys.exit(main())
