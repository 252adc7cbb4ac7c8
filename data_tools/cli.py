"""The command line: `python -m data_tools COMMAND --help`.

Exit status: 0 done (or already done), 1 `verify` found something, 2 bad input or usage, 130 interrupted.
Everything heavy is imported inside the commands.
"""

from __future__ import annotations

import argparse
import json
import sys
from decimal import Decimal, InvalidOperation

from data_tools.arguments import Parser, named_path
from data_tools.errors import DataError
from data_tools.parts import Part

EXAMPLE = """\
from text to shards:
  python -m data_tools corpus stdlib --output corpus.jsonl.zst
  python -m data_tools train-tokenizer --input corpus.jsonl.zst --vocab-size 8192 --output tokenizer/
  python -m data_tools tokenize --input corpus.jsonl.zst --tokenizer tokenizer/ --output shards/ --validation-fraction 0.01
  python -m data_tools verify shards/
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # No fault of a file: `exit_status` sees to it.
        raise
    except OSError as error:
        print(f"error: {error}: check the path, its permissions and the device", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog="python -m data_tools",
        description="Corpora, tokenizers and token shards.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("corpus", help="write a corpus that needs no download")
    command.add_argument("name", choices=["stdlib"], help="stdlib: the Python standard library's sources and prose")
    command.add_argument("--output", type=named_path, required=True, help="file to write: .jsonl, .jsonl.gz or .jsonl.zst")
    command.add_argument("--overwrite", action="store_true", help="replace an output of other content")
    command.set_defaults(run=run_corpus)

    command = commands.add_parser("train-tokenizer", help="train a byte-level BPE tokenizer")
    _add_input(command)
    command.add_argument("--vocab-size", type=int, default=8192, help="ids, special tokens included (default: %(default)s)")
    command.add_argument("--output", type=named_path, required=True, help="folder for tokenizer.json and its configuration")
    command.add_argument("--special-tokens", nargs="+", default=[], metavar="TOKEN", help="more special tokens, after <|endoftext|>")
    command.add_argument("--overwrite", action="store_true", help="replace another tokenizer in the output folder")
    command.set_defaults(run=run_train_tokenizer)

    command = commands.add_parser("tokenize", help="turn text into shards of tokens")
    _add_input(command)
    command.add_argument("--tokenizer", type=named_path, required=True, help="tokenizer.json, or the folder that holds it")
    command.add_argument("--output", type=named_path, required=True, help="folder for shards and manifest.json")
    command.add_argument(
        "--validation-fraction",
        type=_fraction,
        default=Decimal("0.01"),
        help="documents held out, by a hash of their text (default: %(default)s)",
    )
    command.add_argument("--workers", type=_positive, help="processes; the output does not depend on it (default: all processors)")
    command.add_argument(
        "--backend",
        choices=["auto", "gigatoken", "tiktoken", "tokenizers"],
        default="auto",
        help="encoder (default: the fastest that agrees with tokenizers)",
    )
    command.add_argument("--eod-token", help="end-of-document token (default: eos_token of tokenizer_config.json, or a well-known one)")
    command.add_argument(
        "--dtype", choices=["auto", "u16", "u32"], default="auto", help="of the token ids (default: the smallest that holds the vocabulary)"
    )
    command.add_argument(
        "--block-tokens", type=_positive, default=1 << 20, help="tokens of a block, whole documents (default: %(default)s)"
    )
    command.add_argument(
        "--shard-tokens", type=_positive, default=256 << 20, help="tokens of a shard, whole blocks (default: %(default)s, 0.5 to 1 GB)"
    )
    command.add_argument(
        "--unit-bytes", type=_positive, default=32 << 20, help="input handled at a time, not seen in the output (default: %(default)s)"
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace the output of another job; files that tokenize did not write stay"
    )
    command.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="do part I (from 0) of N, which other machines do at the same time or later into the same folder (slurm/tokenize.sh)",
    )
    command.set_defaults(run=run_tokenize)

    command = commands.add_parser("verify", help="check every byte of a shards folder; exit status 1 names what is wrong")
    command.add_argument("shards", type=named_path, help="shards folder")
    command.add_argument("--workers", type=_positive, help="threads (default: all processors)")
    command.set_defaults(run=run_verify)

    command = commands.add_parser("inspect", help="show documents, or samples as the trainer sees them, as text")
    command.add_argument("shards", type=named_path, help="shards folder")
    command.add_argument("--split", default="train", choices=["train", "validation"], help="(default: %(default)s)")
    command.add_argument("--start", type=_not_negative, default=0, help="first document or sample (default: %(default)s)")
    command.add_argument("--count", type=_positive, default=3, help="how many (default: %(default)s)")
    command.add_argument("--sequence-length", type=_positive, help="show samples of this many tokens instead of documents")
    command.add_argument("--characters", type=_positive, default=400, help="of each, at most (default: %(default)s)")
    command.set_defaults(run=run_inspect)

    command = commands.add_parser("stats", help="the corpus as a table: documents, tokens, lengths, entropy, what was dropped")
    command.add_argument("shards", type=named_path, help="shards folder")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run_stats)
    return parser


def _add_input(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--input",
        type=named_path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="jsonl, txt, md, rst, parquet; .gz and .zst of all but parquet",
    )
    command.add_argument("--text-field", default="text", help="field of a jsonl object, or parquet column (default: %(default)s)")
    command.add_argument(
        "--on-invalid",
        choices=["error", "skip"],
        default="error",
        help="documents that are not UTF-8, not JSON or without text: stop, or leave them out (default: %(default)s)",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _fraction(text: str) -> Decimal:
    try:
        value = Decimal(text)
    except InvalidOperation as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error
    # NaN compares with nothing.
    if not value.is_finite() or not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def _part(text: str) -> Part:
    try:
        return Part.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def run_corpus(options: argparse.Namespace) -> int:
    from data_tools.corpus import write_stdlib

    result = write_stdlib(options.output, overwrite=options.overwrite)
    state = "already there" if result.already_there else "written"
    print(f"{options.output}: {result.documents} documents, {result.text_bytes / 1e6:.1f} MB of text, {state}")
    return 0


def run_train_tokenizer(options: argparse.Namespace) -> int:
    from data_tools.tokenizer import load_tokenizer, train_tokenizer

    trained = train_tokenizer(
        options.input,
        options.vocab_size,
        options.output,
        options.text_field,
        tuple(options.special_tokens),
        options.overwrite,
        options.on_invalid,
    )
    tokenizer = load_tokenizer(options.output)
    state = "trained" if trained else "already there"
    print(f"{tokenizer.path}: {tokenizer.vocab_size} ids, {tokenizer.eod_token} is {tokenizer.eod_id}, {state}")
    return 0


def run_tokenize(options: argparse.Namespace) -> int:
    from data_tools.job import TokenizeOptions
    from data_tools.tokenize import tokenize
    from data_tools.workers import available_cpus

    settings = TokenizeOptions(
        validation_fraction=options.validation_fraction,
        text_field=options.text_field,
        on_invalid=options.on_invalid,
        backend=options.backend,
        dtype={"auto": "auto", "u16": "uint16", "u32": "uint32"}[options.dtype],
        block_tokens=options.block_tokens,
        shard_tokens=options.shard_tokens,
    )
    result = tokenize(
        options.input,
        options.tokenizer,
        options.output,
        settings,
        workers=options.workers or available_cpus(),
        unit_bytes=options.unit_bytes,
        eod_token=options.eod_token,
        overwrite=options.overwrite,
        part=options.part,
    )
    manifest = result.manifest
    if manifest is None:
        print(f"{options.output}: part {options.part} is done, another part joins the shards; if that one dies, start any part again")
        return 0
    splits = ", ".join(f"{manifest.tokens(split)} {split} tokens in {manifest.documents(split)} documents" for split in manifest.splits)
    dropped = {
        name: count for name, count in manifest.content["filters"].items() if count and name not in ("documents", "text_bytes", "kept")
    }
    left_out = f"; left out: {', '.join(f'{count} {name}' for name, count in dropped.items())}" if dropped else ""
    state = "already there, this job was finished before" if result.already_there else f"written with {manifest.content['backend']['name']}"
    print(f"{options.output}: {splits}{left_out}; {state}")
    return 0


def run_verify(options: argparse.Namespace) -> int:
    from data_tools.verify import verify
    from data_tools.workers import available_cpus

    findings = verify(options.shards, options.workers or available_cpus())
    for finding in findings:
        print(f"{options.shards / finding.file}: {finding.problem}")
    if findings:
        print(
            f"{len(findings)} of the files in {options.shards} are not what tokenize wrote: copy them again or tokenize with --overwrite",
            file=sys.stderr,
        )
        return 1
    print(f"{options.shards}: every byte is what tokenize wrote")
    return 0


def run_inspect(options: argparse.Namespace) -> int:
    from data_tools.inspection import documents_as_text, samples_as_text

    if options.sequence_length:
        items = samples_as_text(options.shards, options.split, options.sequence_length, options.start, options.count)
    else:
        items = documents_as_text(options.shards, options.split, options.start, options.count)
    for item in items:
        text = item.text if len(item.text) <= options.characters else item.text[: options.characters] + " [...]"
        print(f"--- {item.title}\n{text}")
    return 0


def run_stats(options: argparse.Namespace) -> int:
    from data_tools.stats import as_table, collect

    stats = collect(options.shards)
    print(json.dumps(stats, indent=2) if options.json else as_table(stats))
    return 0
