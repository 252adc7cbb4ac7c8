"""Throughput of tokenization and of the reader on real text: `python -m data_tools.benchmark`.

The text is every distinct .py file of this environment's site-packages and of the standard library (up to --megabytes),
as jsonl. Tokenization is measured end to end in a process of its own, start-up, hash pass, verification of the encoder,
shards and manifest included: MB (10^6 bytes) of UTF-8 text per CPU-second, user and system time of all its processes.
The reader is measured in one process with a new dataset, so that computing the order is included, and each token is
copied into an int64 batch; the shards are in the page cache.

Prints one JSON object. Times on a shared machine are noisy: each figure is given for every repetition, interleaved with
what reading and encoding alone achieve at that time.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from data_tools.arguments import Parser, named_path

MIN_BYTES = 64
MAX_BYTES = 1_000_000


def write_corpus(path: Path, roots: list[Path], limit_bytes: int) -> int:
    """Writes distinct UTF-8 .py files below `roots` as jsonl. Returns the bytes of their text."""
    seen = set()
    written = 0
    with open(path, "wb") as file:
        for source in (source for root in roots for source in sorted(root.rglob("*.py"))):
            content = source.read_bytes()
            digest = hashlib.sha256(content).digest()
            if not MIN_BYTES <= len(content) <= MAX_BYTES or digest in seen:
                continue
            try:
                text = content.decode()
            except UnicodeDecodeError:
                continue
            seen.add(digest)
            file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            written += len(content)
            if written >= limit_bytes:
                break
    return written


def run_command(*arguments: str | Path) -> tuple[float, float]:
    """Runs `python -m data_tools` with the arguments. Returns wall seconds and CPU seconds of all its processes."""
    before = os.times()
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "data_tools", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu


def measure_encoder(corpus: Path, tokenizer: Path) -> float:
    """MB of text per CPU-second of reading jsonl and encoding it alone, in this process: the yardstick for the machine's state."""
    from data_tools.backends import BACKENDS
    from data_tools.documents import open_sources, plan_units, read_part
    from data_tools.tokenizer import load_tokenizer

    encoder = BACKENDS["gigatoken"].load(load_tokenizer(tokenizer))
    text_bytes = 0
    start = time.process_time()
    for unit in plan_units(open_sources([corpus])):
        for part in unit.parts:
            for text in read_part(part, "text"):
                text_bytes += len(text.encode())
                encoder.encode(text)
    return round(text_bytes / 1e6 / (time.process_time() - start), 1)


def measure_reader(shards: Path, sequence_length: int, micro_batch_size: int, num_tokens: int) -> dict[str, float]:
    """Tokens per second of a new TokenDataset in this process."""
    from data_tools.reader import TokenDataset

    start, cpu = time.perf_counter(), time.process_time()
    dataset = TokenDataset(
        shards, "train", sequence_length, seed=0, micro_batch_size=micro_batch_size, global_batch_size=64 * micro_batch_size
    )
    tokens = 0
    for batch in dataset:
        assert batch["tokens"].shape == (micro_batch_size, sequence_length + 1)
        tokens += micro_batch_size * sequence_length
        if tokens >= num_tokens:
            break
    return {
        "tokens_per_s": round(tokens / (time.perf_counter() - start)),
        "tokens_per_cpu_s": round(tokens / (time.process_time() - cpu)),
    }


def main() -> None:
    """Measures and prints."""
    parser = Parser(prog="python -m data_tools.benchmark", description="Throughput of tokenization and of the reader.")
    roots = [Path(sysconfig.get_path(name)) for name in ("purelib", "stdlib")]
    parser.add_argument(
        "--roots", type=named_path, nargs="+", default=roots, help="folders of .py files (default: site-packages and the standard library)"
    )
    parser.add_argument("--megabytes", type=int, default=1000, help="of text (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=32768, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="worker counts to measure (default: 1 2)")
    parser.add_argument("--repetitions", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=2048, help="of the reader (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text_bytes = write_corpus(folder / "corpus.jsonl", options.roots, options.megabytes * 1_000_000)
        write_corpus(folder / "sample.jsonl", options.roots, 20_000_000)
        run_command(
            "train-tokenizer", "--input", folder / "sample.jsonl", "--vocab-size", str(options.vocab_size), "--output", folder / "tokenizer"
        )
        result = {
            "text_megabytes": round(text_bytes / 1e6, 1),
            "vocab_size": options.vocab_size,
            "encoder_alone_megabytes_per_cpu_s": [],
            "tokenize": [],
            "reader": [],
        }
        for _ in range(options.repetitions):
            for workers in options.workers:
                job = ("--input", folder / "corpus.jsonl", "--tokenizer", folder / "tokenizer", "--output", folder / "shards")
                wall, cpu = run_command("tokenize", *job, "--workers", str(workers), "--overwrite")
                result["tokenize"].append(
                    {
                        "workers": workers,
                        "megabytes_per_cpu_s": round(text_bytes / 1e6 / cpu, 1),
                        "megabytes_per_s": round(text_bytes / 1e6 / wall, 1),
                    }
                )
            result["encoder_alone_megabytes_per_cpu_s"].append(measure_encoder(folder / "corpus.jsonl", folder / "tokenizer"))
            result["reader"].append(measure_reader(folder / "shards", options.sequence_length, 16, 400_000_000))
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
