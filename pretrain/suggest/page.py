"""What `--suggest` prints: the table, the flags to copy, and where the numbers come from, in plain words."""

from dataclasses import fields

from pretrain.gpus import GPUS
from pretrain.suggest.search import COMFORTABLE, EQUAL, Candidate, Suggestions
from pretrain.suggest.step_time import REACHED, Cluster, StepTime

GIB = 2**30
ROWS = 10
MEMORY_PARTS = ("weights", "gradients", "optimizer", "codes", "gathered", "activations")
TIME_PARTS = tuple(part.name for part in fields(StepTime))
HEADER = (
    "", "tensor", "pipeline", "expert", "zero", "recompute", "micro-batches", "memory", "free", "step", "tokens/s/GPU", "days", *TIME_PARTS,
)  # fmt: skip


def layout_table(found: Suggestions, configured: Candidate | None, cluster: Cluster) -> str:
    """The fastest layouts, the one to take, and the configuration's own, each once."""
    best, shown = found.best, found.fitting[:ROWS]
    marks = {id(candidate): str(number) for number, candidate in enumerate(shown, 1)}
    if best is not None and id(best) not in marks:
        shown, marks[id(best)] = [*shown, best], str(found.fitting.index(best) + 1)
    rows = [("* " if candidate is best else "  ") + marks[id(candidate)] for candidate in shown]
    table = [HEADER, *((mark, *_cells(candidate, cluster)) for mark, candidate in zip(rows, shown, strict=True))]
    if configured is not None:
        table.append(("  as set", *_cells(configured, cluster)))
    return _aligned(table)


def flags(candidate: Candidate) -> str:
    """The layout on a command line; every setting is named, so that none of a configuration's stays."""
    return " ".join(f"--{name} {str(value).lower()}" for name, value in candidate.settings.items())


def memory_text(candidate: Candidate) -> str:
    memory = candidate.memory
    parts = ", ".join(f"{name} {getattr(memory, name) / GIB:.1f}" for name in MEMORY_PARTS if getattr(memory, name))
    return f"{memory.total / GIB:.1f} GiB: {parts}"


def choice_lines(found: Suggestions) -> list[str]:
    """Which layout to take, why, and its flags."""
    best, fastest = found.best, found.fitting[0]
    lines = [
        f"take *: of the layouts within {100 * EQUAL:.0f} % of the fastest, which the estimate cannot tell apart, the simplest: lowest "
        f"ZeRO stage, experts within a node, fewest pipeline stages, no recomputation, memory below {100 * COMFORTABLE:.0f} %",
        f"  memory of its fullest rank, {memory_text(best)}",
        f"  {flags(best)}",
    ]
    if best is not fastest:
        lines += ["the fastest, if the estimate were exact:", f"  {flags(fastest)}"]
    return lines


def source_lines(cluster: Cluster, gpu_name: str, reserve: float, source: str) -> list[str]:
    gpu = cluster.gpu
    return [
        "where the times come from: arithmetic, not a measurement; the project itself has timed no run on a GPU yet",
        "  step = compute + tensor + experts + bubble + pipeline + gradients + data + optimizer; nothing is taken to overlap",
        f"  compute: FLOPs / ({gpu.efficiency:.3g} of {gpu.peak_flops / 1e12:,.0f} TFLOP/s); {source}",
        f"  tensor, experts, pipeline, data: bytes / ({100 * REACHED:.0f} % of NVLink {gpu.nvlink / 1e9:,.0f} GB/s, or of a node's network "
        f"{cluster.node_bandwidth / 1e9:,.0f} GB/s (--node_bandwidth), one direction)",
        f"  gradients, optimizer: bytes / ({100 * REACHED:.0f} % of {gpu_name}'s memory bandwidth, {gpu.hbm / 1e12:.3g} TB/s)",
        "  bubble: (stages - 1) / (chunks x micro-batches) of compute, tensor and experts",
        "  left out: the cost of top-K and int8 (the README's Status has it for CPUs), latencies and kernel launches, which favour "
        "larger micro-batches and fewer ranks a layer, reading data, saves, validations, restarts",
        f"  memory: what tensors take, see megatron_qsparse/models/memory.py; {100 * reserve:.0f} % of the GPU (--reserve) are left for "
        "the CUDA context, communication buffers, temporary tensors and fragmentation",
        "what makes it better: 20 steps of the layout on the cluster, then --calibrate RUN_DIR, which puts the measured step time in "
        "the place of the assumed fraction; --node_bandwidth as measured",
    ]  # fmt: skip


def nothing_lines(found: Suggestions, cluster: Cluster, usable: float, reserve: float) -> list[str]:
    """Why no layout is left, and what to change."""
    if found.nearest is None:
        reasons = [f"  {reason} ({number} layouts)" for reason, number in found.refused.most_common(3)]
        return ["error: no layout is possible on these processes; the most frequent reasons:", *reasons]
    nearest, total = found.nearest, found.nearest.memory.total
    larger = [name for name, gpu in GPUS.items() if (1 - reserve) * gpu.memory >= total]
    remedies = ["more --nodes", "a shorter data.sequence_length", "a smaller model"]
    if larger:
        remedies.insert(0, f"--gpu {larger[0]}")
    if total <= cluster.gpu.memory:
        remedies.append(f"a --reserve below {1 - total / cluster.gpu.memory:.2f}, at the risk of running out of memory")
    return [
        f"error: none of {found.possible:,} possible layouts fits; the nearest needs {total / GIB:.1f} of {usable / GIB:.1f} GiB:",
        f"  {memory_text(nearest)}",
        f"  {flags(nearest)}",
        f"  change one of: {'; '.join(remedies)}",
    ]


def _cells(candidate: Candidate, cluster: Cluster) -> tuple[str, ...]:
    parallel, train, time = candidate.config.parallel, candidate.config.train, candidate.time
    rate = candidate.tokens / time.total / cluster.world_size
    return (
        f"{parallel.tensor}{' seq' if parallel.sequence else ''}",
        f"{parallel.pipeline}{f' x {parallel.virtual_pipeline}' if parallel.virtual_pipeline > 1 else ''}",
        str(parallel.expert), str(candidate.config.zero.stage), "yes" if train.recompute else "no",
        f"{candidate.micro_batches} of {train.micro_batch_size}",
        f"{candidate.memory.total / GIB:.1f} GiB", f"{100 * (1 - candidate.memory.total / cluster.gpu.memory):.0f} %",
        f"{time.total:.3f} s", f"{rate:,.0f}", f"{train.steps * time.total / 86400:.2f}",
        *(f"{getattr(time, part):.3f}" for part in TIME_PARTS),
    )  # fmt: skip


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
