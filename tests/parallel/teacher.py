"""Teacher forcing: a reference run writes checkpoints, and each layout loads them and takes one step as the reference did."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from tests.parallel.comparison import Comparison, Trace, compare
from tests.parallel.helpers import build, gather, global_names, layout, reports
from tests.parallel.recording import projection_name, recording
from tests.parallel.training import GLOBAL_BATCH, Case, case_layout, make_engine, take_step

AFTER = (1, 3)
"""Updates done when the reference writes a checkpoint: moments of one update, and of several."""
BATCHES = 4
"""Global batches tried from a checkpoint until one has no flip: a near-tie that flips moves everything after it, legitimately."""


def whole_weights(variant: str, layers: int = 2) -> dict[str, torch.Tensor]:
    """Weights whose logical matrices have clearly different scales, with norm weights that are not all one; needs TP = PP = 1."""
    from megatron_qsparse.config import ParallelConfig

    generator = torch.Generator().manual_seed(7)
    model = build(variant, ParallelConfig(), seed=3, layers=layers)
    config, weights = model.config, {}
    for name, param in global_names(model).items():
        weight = param.detach().clone()
        if weight.dim() == 1:
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
        elif name.endswith("linear_qkv.weight"):
            per_group = config.num_attention_heads // config.num_query_groups + 2
            slot = torch.arange(weight.shape[0]) // config.kv_channels % per_group
            weight *= torch.where(slot == per_group - 2, 2.0, torch.where(slot == per_group - 1, 0.5, 1.0))[:, None]
        elif name.endswith("linear_fc1.weight"):
            weight[weight.shape[0] // 2 :] *= 3
        weights[name] = weight
    return weights


def write_reference(rank: int, root: Path, case: Case, batch: int, following: bool) -> None:
    """Train alone and write checkpoints, unless they are there; then the traces of the steps from each of them.

    root appears once it is whole: a reference that failed halfway is no reference.
    """
    from megatron_qsparse.parallel import checkpoint

    with layout() as parallel:
        engine = make_engine(case, parallel, whole_weights(case.variant, case.layers))
        if not root.exists():
            unfinished = root.with_name(f"{root.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            for updates in range(max(AFTER) + 1):
                if updates:
                    take_step(engine, updates)
                if updates in AFTER:
                    _state(unfinished, updates).mkdir(parents=True)
                    checkpoint.save(engine, _state(unfinished, updates))
            unfinished.rename(root)
        for updates in AFTER:
            checkpoint.load(engine, _state(root, updates))
            for later in range(1 + following):
                torch.save(traced_step(engine, _seed(updates, batch, later)), _trace(root, updates, batch, later))


def against_reference(rank: int, root: Path, case: Case, after: Iterable[int], batch: int, following: bool) -> list[list[Comparison]]:
    """The reference's steps in this layout, from the checkpoints after so many updates; on rank 0, elsewhere nothing.

    following: compare the next step too, which starts from this layout's own weights.
    """
    from megatron_qsparse.parallel import checkpoint

    found = []
    with case_layout(case) as parallel:
        engine = make_engine(case, parallel)
        for updates in after:
            checkpoint.load(engine, _state(root, updates))
            _assert_empty(engine)
            traces = [traced_step(engine, _seed(updates, batch, later)) for later in range(1 + following)]
            if rank == 0:
                expected = [torch.load(_trace(root, updates, batch, later), weights_only=False) for later in range(1 + following)]
                names = [f"step {updates + 1 + later} of batch {batch}" for later in range(1 + following)]
                found.append([compare(*step) for step in zip(names, expected, traces, strict=True)])
    return found


def _state(root: Path, updates: int) -> Path:
    return root / f"after{updates}"


def _trace(root: Path, updates: int, batch: int, later: int) -> Path:
    return root / f"after{updates}-batch{batch}-{later}.pt"


def _seed(updates: int, batch: int, later: int) -> int:
    return 100 * updates + 2 * batch + later


def traced_step(engine, seed: int, samples: int = GLOBAL_BATCH) -> Trace:
    """One training step. Collective; rank 0 has the whole tensors of all ranks, the others a trace without any."""
    differing: list[str] = []
    with recording(engine.model) as recorder, _kept_gradients(engine):
        result = take_step(engine, seed, samples=samples)
        _assert_empty(engine)
        trace = Trace(
            result.loss, result.grad_norm, optimizer_tensors(engine, "gradient", differing), optimizer_tensors(engine, None, differing),
            _updates(engine), _alphas(engine.model), {}, differing,
        )  # fmt: skip
    trace.choices = recorder.joined(differing)
    return trace


def _assert_empty(engine) -> None:
    """Nothing would be tested at stage 3 where parameters were whole."""
    assert engine.stage < 3 or not any(param.numel() for param in engine.model.parameters())


def _updates(engine) -> int:
    """AdamW's count, the same for all its tensors."""
    [count] = {int(state["step"]) for state in engine.optimizer.optimizer.state.values()}
    return count


class _kept_gradients:
    """Keeps what AdamW was given beside its moments, where DeepSpeed's accessors find it at every stage."""

    def __init__(self, engine):
        self.adamw = engine.optimizer.optimizer

    def __enter__(self) -> None:
        self.handle = self.adamw.register_step_post_hook(self._keep)

    def __exit__(self, *_) -> None:
        self.handle.remove()
        for state in self.adamw.state.values():
            state.pop("gradient", None)

    @staticmethod
    def _keep(adamw, *_) -> None:
        for group in adamw.param_groups:
            for param in group["params"]:
                adamw.state[param]["gradient"] = param.grad.clone()


def optimizer_tensors(engine, kind: str | None, differing: list[str] | None = None) -> dict[str, torch.Tensor]:
    """fp32 tensors of the optimizer by parameter, whole, on rank 0: master weights (None), "exp_avg", "exp_avg_sq" or "gradient"."""
    from megatron_qsparse.compat import deepspeed

    utils = deepspeed.load().utils
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()

    def pick(param):
        full = utils.safe_get_full_fp32_param(param) if kind is None else utils.safe_get_full_optimizer_state(param, kind)
        return full.view(param.shape)

    return gather(engine.model, pick, differing, everywhere=False)


def _alphas(model) -> dict[str, torch.Tensor]:
    """Rows of one rank may belong to several matrices; as sets they are comparable across layouts."""
    mine = {projection_name(m): m.ternary.alpha for m in model.modules() if getattr(m, "ternary", None) is not None}
    everyone = reports(mine, everywhere=False)
    names = {name for report in everyone for name in report}
    return {name: torch.cat([report[name] for report in everyone if name in report]).unique() for name in names}
