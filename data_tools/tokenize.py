"""The tokenization job: documents in, shards out, the same bytes for any number of workers and after any restart.

1. Hash pass: every unit's documents are read and hashed (passes.py).
2. Plan: exact global deduplication and the split (dedup.py).
3. Tokenization: units are encoded by the workers; this process joins their tokens in input order into blocks and
   shards (shards.py). Shard boundaries depend on the sequence of document lengths alone.
4. The tokenizer and the manifest are written, and with them the job is finished.

A unit's tokens are deleted once the shards that hold them are published, so the work folder holds about one shard of
each split and the units in flight.

Several machines may do one job, each a part of it (parts.py, shared.py): both passes go over all units, one part joins the
shards once all units have been tokenized, and until then the work folder holds the tokens of all of them.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.backends import Backend, choose_backend
from data_tools.dedup import Plan, plan_documents
from data_tools.documents import UNIT_BYTES, Reason, Rejected, Unit, open_sources, plan_units, read_part
from data_tools.errors import DataError, InputChanged
from data_tools.files import write_atomically
from data_tools.job import Job, TokenizeOptions
from data_tools.manifest import (
    FORMAT_VERSION,
    ITEM_BYTES,
    MANIFEST_NAME,
    MEMBER_SUFFIX,
    SPLITS,
    TOKENIZER_NAME,
    Manifest,
    encode_manifest,
    shard_entry,
)
from data_tools.parts import Part, work_through
from data_tools.passes import HashTask, TokenizeTask, hash_unit, read_journal, tokenize_unit
from data_tools.progress import Progress, warn
from data_tools.shards import ShardWriter
from data_tools.shared import SharedJob
from data_tools.tokenizer import TokenizerFile, load_tokenizer
from data_tools.workers import Workers

SAMPLE_SOURCES = 8
SAMPLE_DOCUMENTS = 8
SAMPLE_CHARACTERS = 2048


@dataclass(frozen=True)
class TokenizeResult:
    """The manifest, and whether this run had to do anything for it."""

    manifest: Manifest | None
    """None where another part of the job joins the shards."""
    already_there: bool


def tokenize(
    inputs: list[Path],
    tokenizer_path: Path,
    output: Path,
    options: TokenizeOptions,
    workers: int,
    unit_bytes: int = UNIT_BYTES,
    eod_token: str | None = None,
    overwrite: bool = False,
    part: Part | None = None,
) -> TokenizeResult:
    """Tokenizes `inputs` into the folder `output`. Raises DataError for whatever a user can mend.

    `workers`: processes; `unit_bytes`: input that a worker handles at a time, and loses when it is killed; `part`: what
    this process does of a job that others work on as well. None of them influences the output.
    """
    sources = open_sources(inputs)
    tokenizer = load_tokenizer(tokenizer_path, eod_token)
    options = dataclasses.replace(options, dtype=_resolve_dtype(tokenizer, options.dtype))
    job = (Job if part is None else SharedJob)(output, sources, tokenizer, options)
    if job.is_finished(overwrite):
        return TokenizeResult(Manifest.load(output), already_there=True)
    with job:
        units = plan_units(sources, unit_bytes)
        backend = choose_backend(tokenizer, options.backend, _sample(units, options.text_field))
        if not job.prepare(backend.versions(), unit_bytes):
            return TokenizeResult(Manifest.load(output), already_there=True)
        with Workers(min(workers, max(len(units), 1))) as pool:
            try:
                plan = _hash_pass(job, units, options, pool, part)
                job.check_sources()
                shards = _tokenize_pass(job, units, plan, tokenizer, options, backend, pool, part)
            except (DataError, OSError) as error:
                job.check_sources()  # a change explains whatever else was found
                if isinstance(error, InputChanged):
                    job.give_up(str(error))
                raise
            job.check_sources()
        if shards is None:
            finished = job.is_complete()
            return TokenizeResult(Manifest.load(output) if finished else None, already_there=finished)
        content = {
            "format_version": FORMAT_VERSION,
            "job": job.digest,
            "tokenizer": {
                "file": TOKENIZER_NAME,
                "sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
                "eod_token": tokenizer.eod_token,
                "eod_id": tokenizer.eod_id,
            },
            "dtype": options.dtype,
            "options": options.as_json(),
            "sources": _source_entries(job, units, plan),
            "filters": _total(plan.counts),
            "backend": {"name": backend.name, "versions": backend.versions()},
            "shards": shards,
        }
        write_atomically(output / TOKENIZER_NAME, tokenizer.content.encode(), staging=job.work)
        write_atomically(output / MANIFEST_NAME, encode_manifest(content), staging=job.work)
        job.finish()
    manifest = Manifest.load(output)
    if options.validation_fraction and "validation" not in manifest.splits:
        warn(f"no document fell into the validation split: the corpus is small for --validation-fraction {options.validation_fraction}")
    return TokenizeResult(manifest, already_there=False)


def _resolve_dtype(tokenizer: TokenizerFile, requested: str) -> str:
    """`auto` is the smallest dtype that holds every id; another one must hold them."""
    fitting = [dtype for dtype, size in ITEM_BYTES.items() if tokenizer.vocab_size <= 1 << (8 * size)]
    if requested == "auto":
        return fitting[0]
    if requested not in fitting:
        problem = f"vocabulary of {tokenizer.vocab_size} ids does not fit --dtype {MEMBER_SUFFIX[requested]}"
        raise DataError(f"{tokenizer.path}: {problem}: pass --dtype u32 or auto")
    return requested


def _sample(units: list[Unit], text_field: str) -> Iterator[str]:
    """Beginnings of the first documents of some of the sources, on which the encoder is checked."""
    parts = [part for unit in units for part in unit.parts if part.start == 0]
    for part in parts[:: max(1, len(parts) // SAMPLE_SOURCES)][:SAMPLE_SOURCES]:
        texts = (text for text in read_part(part, text_field) if not isinstance(text, Rejected))
        for text in itertools.islice(texts, SAMPLE_DOCUMENTS):
            yield text[:SAMPLE_CHARACTERS]


def _hash_pass(job: Job, units: list[Unit], options: TokenizeOptions, pool: Workers, part: Part | None) -> Plan:
    paths = [job.work / "hash" / f"{index:06d}.npz" for index in range(len(units))]
    tasks = [HashTask(unit, path, options.text_field, options.on_invalid) for unit, path in zip(units, paths, strict=True)]
    if part is None:
        with Progress("hash", sum(unit.input_bytes for unit in units)) as progress:
            for size in pool.map(hash_unit, tasks):
                progress.update(size)
    else:
        work_through(part, hash_unit, tasks, pool, job.work / "hash", "hash")
    plan = plan_documents(paths, options.validation_fraction)
    counts = _total(plan.counts)
    if not counts["kept"]:
        found = ", ".join(f"{value} {name}" for name, value in counts.items() if value) or "no document"
        names = ", ".join(str(source.path) for source in job.sources)
        raise DataError(f"empty corpus: nothing to tokenize in {names} ({found}); check --input and --text-field {options.text_field}")
    return plan


def _tokenize_pass(
    job: Job,
    units: list[Unit],
    plan: Plan,
    tokenizer: TokenizerFile,
    options: TokenizeOptions,
    backend: Backend,
    pool: Workers,
    part: Part | None,
) -> list[dict] | None:
    """Encodes the units and joins them into shards. Returns the shards' entries for the manifest, train first.

    None where another part joins them.
    """
    folder = job.work / "tokens"
    tasks = [
        TokenizeTask(unit, folder, f"{index:06d}", options.text_field, unit_plan, tokenizer, backend.name, options.dtype)
        for index, (unit, unit_plan) in enumerate(zip(units, plan.units, strict=True))
    ]
    if part is None:
        return _join(job, tasks, pool.map(tokenize_unit, tasks), options, "tokenize")
    work_through(part, tokenize_unit, tasks, pool, folder, "tokenize")
    if not job.begin_assembly():
        return None
    return _join(job, tasks, [unit.input_bytes for unit in units], options, "join")


def _join(job: Job, tasks: list[TokenizeTask], sizes: Iterable[int], options: TokenizeOptions, description: str) -> list[dict]:
    """Joins the units into shards, each once its size, the bytes of its input, comes out of `sizes`."""
    mergers = [SplitMerger(job, split, options) for split in SPLITS]
    try:
        with Progress(description, sum(task.unit.input_bytes for task in tasks)) as progress:
            for task, size in zip(tasks, sizes, strict=True):
                journal = read_journal(task.folder / f"{task.name}.npz")
                for merger in mergers:
                    merger.add(task.folder / f"{journal.get('stem', task.name)}.{merger.split}", journal[merger.split])
                progress.update(size)
        return [shard_entry(shard) for merger in mergers for shard in merger.writer.finish()]
    finally:
        for merger in mergers:
            merger.writer.abandon()


class SplitMerger:
    """Feeds the units' token files of one split to its shard writer, and deletes those that are in published shards."""

    def __init__(self, job: Job, split: str, options: TokenizeOptions) -> None:
        self.split = split
        self.dtype = np.dtype(options.dtype).newbyteorder("<")
        self.added: collections.deque[Path] = collections.deque()
        self.writer = ShardWriter(
            job.output, job.work / "shards", split, options.dtype, options.block_tokens, options.shard_tokens, self._delete_published
        )

    def add(self, path: Path, lens: np.ndarray) -> None:
        """Appends a unit: its token file, and the lengths uint32 [num_documents] of its documents of this split."""

        def tokens(start: int, stop: int) -> np.ndarray:
            if not path.is_file() or path.stat().st_size != int(lens.sum()) * self.dtype.itemsize:
                # Work files are not flushed to the device. Nothing but the journals says that this one is complete.
                shutil.rmtree(path.parent, ignore_errors=True)
                raise DataError(f"{path} was lost when the machine went down: run the same command again, published shards are kept")
            return np.memmap(path, self.dtype, "r")[start:stop]

        self.writer.add(tokens, lens)
        self.added.append(path)

    def _delete_published(self) -> None:
        # The unit being added reaches beyond the shard; the ones before it lie inside published shards.
        while self.added:
            self.added.popleft().unlink(missing_ok=True)


def _source_entries(job: Job, units: list[Unit], plan: Plan) -> list[dict]:
    of_source: list[list[dict[str, int]]] = [[] for _ in job.source_entries]
    for part, counts in zip((part for unit in units for part in unit.parts), plan.counts, strict=True):
        of_source[part.source_index].append(counts)
    return [{**entry, **_total(counts)} for entry, counts in zip(job.source_entries, of_source, strict=True)]


def _total(counts: list[dict[str, int]]) -> dict[str, int]:
    names = ("documents", "text_bytes", "kept", *(reason.name.lower() for reason in Reason))
    return {name: sum(part[name] for part in counts) for name in names}
