"""What is run, in which order, on how many processes. Imports no torch."""

from dataclasses import dataclass, field, replace
from typing import Literal

LAST, BEFORE = 5, 3
"""Steps of a reference; the step from whose checkpoint layouts take the next one."""
LONG, KILL_AFTER, INTERVAL = 240, 30, 20
"""Steps of the run that is killed, when, and between its checkpoints: it must not be done before."""

Kind = Literal["reference", "layout", "reshard", "unbroken", "killed", "continued"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One start of pretrain.train."""

    name: str
    kind: Kind
    variant: str
    precision: Literal["fp32", "bf16"]
    processes: int
    flags: tuple[str, ...] = ()
    reference: str = ""
    """Name of the case that it is compared with."""
    begins: tuple[str, int] | None = None
    """Case and step of the checkpoint that it begins with, a copy; None: at step 0."""
    directory: str = ""
    """Name of the case whose run it goes on with; its own where empty."""
    near: Literal["equal", "tipped", "rounded"] = "equal"
    """How near to the reference it must be (pretrain.acceptance.compare)."""

    @property
    def run(self) -> str:
        return self.directory or self.name

    @property
    def once_more(self) -> "Case":
        """A layout's step behind the reference's next checkpoint."""
        return replace(self, name=f"{self.name}, once more", begins=(self.reference, BEFORE + 1))


@dataclass(frozen=True)
class Layout:
    name: str
    processes: int
    flags: tuple[str, ...] = field(default_factory=tuple)
    rounds: bool = False
    """Whether it divides matrices: sums are then rounded in parts, one process rounds them once."""


SEQUENCE = ("--parallel.sequence", "true")
LAYOUTS = (
    Layout("data 2", 2),
    Layout("data 2, ZeRO 2", 2, ("--zero.stage", "2")),
    Layout("data 2, ZeRO 3", 2, ("--zero.stage", "3")),
    Layout("tensor 2", 2, ("--parallel.tensor", "2", *SEQUENCE), rounds=True),
    Layout("pipeline 2", 2, ("--parallel.pipeline", "2")),
    Layout("tensor 2, pipeline 2", 4, ("--parallel.tensor", "2", *SEQUENCE, "--parallel.pipeline", "2"), rounds=True),
    Layout("tensor 2, data 2, ZeRO 2", 4, ("--parallel.tensor", "2", *SEQUENCE, "--zero.stage", "2"), rounds=True),
    Layout("tensor 4, data 2", 8, ("--parallel.tensor", "4", *SEQUENCE), rounds=True),
    Layout("tensor 2, pipeline 2, data 2", 8, ("--parallel.tensor", "2", *SEQUENCE, "--parallel.pipeline", "2"), rounds=True),
    Layout("data 8, ZeRO 3", 8, ("--zero.stage", "3")),
)
EXPERTS = (
    Layout("expert 2", 2, ("--parallel.expert", "2")),
    Layout("expert 2, tensor 2", 4, ("--parallel.expert", "2", "--parallel.tensor", "2", *SEQUENCE), rounds=True),
    Layout("expert 8", 8, ("--parallel.expert", "8")),
)
SPARSE = ("--qsparse.keep", "0.4", "--qsparse.groups", "8")
QUANTIZED = ("--bitnet.enabled", "true", "--bitnet.subln", "true")
DENSE = ("--model.ffn_hidden_size", "256")
VARIANTS = {
    "dense": DENSE,
    "qsparse": (*DENSE, *SPARSE),
    "bitnet_qsparse": (*DENSE, *SPARSE, *QUANTIZED),
    "moe_qsparse": (*SPARSE, "--model.num_experts", "8", "--model.moe_router_topk", "2", "--model.moe_ffn_hidden_size", "64"),
}
CUT = tuple(layout for layout in LAYOUTS if layout.rounds)
WHOLE = tuple(layout for layout in LAYOUTS if not layout.rounds)
TABLE = (
    ("bitnet_qsparse", "fp32", LAYOUTS),
    ("qsparse", "fp32", CUT),
    ("moe_qsparse", "fp32", EXPERTS),
    ("bitnet_qsparse", "bf16", WHOLE),
    # With masks and codes one entry that rounding tips moves all that follows it.
    ("dense", "bf16", CUT),
)
RESHARDED = ("data 2, ZeRO 3", "tensor 2", "pipeline 2")
COMMON = (
    *("--model.preset", "tiny", "--model.num_layers", "2", "--model.hidden_size", "128"),
    *("--model.num_attention_heads", "4", "--data.sequence_length", "64"),
    *("--train.micro_batch_size", "2", "--train.global_batch_size", "16", "--train.log_interval", "1", "--train.deterministic", "true"),
    *("--optimizer.lr", "1e-3", "--schedule.warmup_steps", "2", "--validation.samples", "16"),
    *("--tracking.enabled", "false", "--tracking.system_metrics", "false"),
)


def cases(processes: int) -> tuple[list[Case], list[tuple[str, str]]]:
    """(cases in the order in which they run, (name, reason) of those that need more processes)."""
    found: list[Case] = []
    left_out: list[tuple[str, str]] = []
    steps = ("--train.steps", str(LAST), "--checkpoint.interval", "1", "--checkpoint.keep_last", str(LAST))
    for variant, precision, layouts in TABLE:
        what = {"variant": variant, "precision": precision}
        reference = f"{variant} {precision}"
        if not any(layout.processes <= processes for layout in layouts):
            left_out += [(f"{reference}, {layout.name}", _too_few(layout, processes)) for layout in layouts]
            continue
        found.append(Case(name=reference, kind="reference", processes=1, flags=steps, **what))
        for layout in layouts:
            name = f"{reference}, {layout.name}"
            if layout.processes > processes:
                left_out.append((name, _too_few(layout, processes)))
                continue
            near = "equal"
            if layout.rounds:
                near = "rounded" if precision == "bf16" else "tipped" if variant.startswith("bitnet") else "equal"
            case = Case(
                name=name, kind="layout", processes=layout.processes, flags=(*layout.flags, *steps), reference=reference,
                begins=(reference, BEFORE), near=near, **what,
            )  # fmt: skip
            found.append(case)
    return [*found, *_resharded(steps), *_killed()], left_out


def _too_few(layout: Layout, processes: int) -> str:
    return f"needs {layout.processes} processes, there are {processes}"


def _resharded(steps: tuple[str, ...]) -> list[Case]:
    """The last steps of a reference, each at another layout that goes on from the one before. Without BitNet losses stay equal
    over several steps: rounding tips no ternary weight."""
    layouts = {layout.name: layout for layout in LAYOUTS}
    what = {"variant": "qsparse", "precision": "fp32"}
    found: list[Case] = []
    for step, name in enumerate(RESHARDED, start=LAST - len(RESHARDED) + 1):
        found.append(
            Case(
                name=f"resharded, from step {step}: {name}", kind="reshard", processes=2, flags=(*layouts[name].flags, *steps),
                reference="qsparse fp32", begins=(found[-1].name if found else "qsparse fp32", step - 1), **what,
            )
        )  # fmt: skip
    return found


def _killed() -> list[Case]:
    what = {"variant": "bitnet_qsparse", "precision": "bf16", "processes": 2}
    flags = ("--train.steps", str(LONG), "--checkpoint.interval", str(INTERVAL))
    return [
        Case(name="unbroken", kind="unbroken", flags=flags, **what),
        Case(name="killed", kind="killed", flags=flags, directory="killed", **what),
        Case(name="killed and started again", kind="continued", flags=flags, directory="killed", reference="unbroken", **what),
    ]
