"""The mixture-of-experts layer against a loop over tokens and experts, in one process; experts without tokens in every mode."""

import pytest
import torch
import torch.nn.functional as F

from megatron_qsparse.config import BitNetConfig, ParallelConfig, QSparseConfig, RecipeRule
from megatron_qsparse.layers.expert_meter import ExpertMeters
from megatron_qsparse.layers.meter import SparsityMeters
from megatron_qsparse.layers.ternary import TernaryWeights
from megatron_qsparse.models.gpt import build_model
from megatron_qsparse.ops.topk import topk_mask
from tests.parallel.helpers import CPU, EXPERTS, SEQUENCE, small_model, tokens
from tests.parallel.training import starving

BATCH, HIDDEN, COEFFICIENT = 3, 64, 0.05
QSPARSE = QSparseConfig(keep=0.4, groups=8)
SHARED = {"moe_shared_expert_ffn_hidden_size": 32}


def _model(qsparse=None, bitnet=None, dtype=torch.float32, **changes):
    shape = {**EXPERTS, "moe_aux_loss_coeff": COEFFICIENT, **changes}
    model = build_model(
        small_model(**shape), qsparse or QSparseConfig(), bitnet or BitNetConfig(), ParallelConfig(),
        sequence_length=SEQUENCE, dtype=dtype, seed=0, device=CPU,
    )  # fmt: skip
    ternary = TernaryWeights(model.modules())
    return model, ternary


def _input(seed: int = 0) -> torch.Tensor:
    return torch.randn(SEQUENCE, BATCH, HIDDEN, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def _masked(x: torch.Tensor, keep: int | None, groups: int) -> torch.Tensor:
    """Top-K with a straight-through gradient."""
    return x if keep is None else x + (torch.where(topk_mask(x, keep, groups), x, 0.0) - x).detach()


def _gated(x, fc1, fc2, factor, sparse: bool) -> torch.Tensor:
    gate, up = (_masked(x, 26 if sparse else None, 1) @ fc1.weight.t()).chunk(2, dim=-1)
    hidden = F.relu(gate).square() * up
    width = hidden.shape[-1] // 8
    keep = max(1, int(0.4 * width + 0.5)) if sparse else None
    if fc2.sub_norm is None:
        return _masked(hidden * factor, keep, 8) @ fc2.weight.t()
    normalized = F.rms_norm(hidden, hidden.shape[-1:], fc2.sub_norm.weight, fc2.sub_norm.eps)
    return _masked(normalized, keep, 8) @ fc2.weight.t() * factor


def _naive(mlp, x: torch.Tensor, chosen: int, sparse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, load-balancing loss averaged over the sequences), expert by expert and token by token."""
    logits = x @ mlp.router.weight.t()
    top = logits.topk(chosen, dim=-1)
    factors = torch.softmax(top.values, dim=-1) if chosen > 1 else torch.softmax(logits, -1).gather(-1, top.indices)
    output = torch.zeros_like(x)
    for s in range(SEQUENCE):
        for b in range(BATCH):
            row = sum(
                _gated(x[s, b], expert.linear_fc1, expert.linear_fc2, factors[s, b, slot], sparse)
                for slot, expert in ((slot, mlp.experts.local_experts[top.indices[s, b, slot]]) for slot in range(chosen))
            )
            output[s, b] = row
    if mlp.shared_experts is not None:
        output = output + _gated(x, mlp.shared_experts.linear_fc1, mlp.shared_experts.linear_fc2, 1.0, sparse)
    experts = logits.shape[-1]
    fractions = F.one_hot(top.indices, experts).sum(2).float().mean(0) / chosen
    losses = experts * (fractions * torch.softmax(logits, -1).mean(0)).sum(-1)
    return output, losses.mean()


@pytest.mark.parametrize("subln", [False, True], ids=["", "subln"])
@pytest.mark.parametrize("sparse", [False, True], ids=["", "groups"])
@pytest.mark.parametrize(("chosen", "shape"), [(2, {}), (2, SHARED), (1, {}), (4, SHARED)])
def test_output_and_gradients_are_those_of_a_loop(alone, chosen, shape, sparse, subln):
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    model, _ = _model(QSPARSE if sparse else None, BitNetConfig(subln=subln), moe_router_topk=chosen, **shape)
    mlp, x = model.decoder.layers[0].mlp, _input()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    operands = {"x": x, **dict(mlp.named_parameters())}
    MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), 0.5))
    found = mlp(x)[0]
    ours = torch.autograd.grad((found * grad).sum(), list(operands.values()))
    output, loss = _naive(mlp, x, chosen, sparse)
    naive = torch.autograd.grad((output * grad).sum() + 0.5 * COEFFICIENT * loss, list(operands.values()))
    assert torch.allclose(found, output, rtol=1e-4, atol=1e-5)
    for name, a, b in zip(operands, ours, naive, strict=True):
        assert b.any() and (a - b).abs().max() <= 2e-5 * b.abs().max(), name


MODES = {
    "dense": (QSparseConfig(), BitNetConfig()),
    "groups": (QSPARSE, BitNetConfig()),
    "block": (QSparseConfig(keep=0.5, mode="block", block_m=16), BitNetConfig()),
    "global": (QSparseConfig(keep=0.4, mode="global"), BitNetConfig()),
    "rescale": (QSparseConfig(keep=0.4, groups=8, rescale="l2"), BitNetConfig()),
    "bitnet": (QSparseConfig(), BitNetConfig(enabled=True)),
    "everything": (QSPARSE, BitNetConfig(enabled=True, subln=True)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_experts_without_tokens_have_gradients_of_zero(alone, mode, dtype):
    model, _ = _model(*MODES[mode], dtype=dtype, **SHARED)
    batch = tokens(2)
    with starving(2):
        losses = model(batch[:, :-1].contiguous(), torch.arange(SEQUENCE).expand(2, -1), None, labels=batch[:, 1:].contiguous())
        losses.float().mean().backward()
    assert losses.isfinite().all()
    for name, param in model.named_parameters():
        starved = ".local_experts.0." in name or ".local_experts.1." in name
        assert param.grad is not None and param.grad.isfinite().all() and param.grad.any() != starved, name


def test_experts_share_their_settings_and_a_shared_expert_has_its_own(alone):
    recipe = [RecipeRule(match="*.mlp.down", keep=0.25), RecipeRule(match="*.mlp.shared_*", keep=1.0, bitnet=False)]
    model, _ = _model(QSparseConfig(keep=0.5, groups=8, recipe=recipe), BitNetConfig(enabled=True, subln=True), **SHARED)
    linears = [module for module in model.modules() if hasattr(module, "settings")]
    found = {}
    for linear in linears:
        settings = linear.settings
        found.setdefault(settings.name, []).append((linear.expert, float(settings.keep), settings.quantized, linear.sub_norm is not None))
    for layer in range(2):
        assert found[f"layers.{layer}.mlp.gate_up"] == [(expert, 0.5, True, False) for expert in range(4)]
        assert found[f"layers.{layer}.mlp.down"] == [(expert, 0.25, True, True) for expert in range(4)]
        assert found[f"layers.{layer}.mlp.shared_gate_up"] == [(None, 1.0, False, False)]
        assert found[f"layers.{layer}.mlp.shared_down"] == [(None, 1.0, False, True)]
        assert not hasattr(model.decoder.layers[layer].mlp.router, "settings")


def test_every_expert_has_its_own_alphas(alone):
    model, ternary = _model(bitnet=BitNetConfig(enabled=True), **SHARED)
    experts = model.decoder.layers[1].mlp.experts.local_experts
    with torch.no_grad():
        for number, expert in enumerate(experts):
            expert.linear_fc1.weight[HIDDEN:] *= 2 + number
            expert.linear_fc2.weight *= 5 + number
    ternary.refresh()
    for expert in experts:
        gate, up = expert.linear_fc1.weight.detach().double().abs().chunk(2)
        expected = [gate.mean().item()] * HIDDEN + [up.mean().item()] * HIDDEN
        assert expert.linear_fc1.ternary.alpha.tolist() == pytest.approx(expected, rel=1e-6)
        assert expert.linear_fc2.ternary.alpha.unique().tolist() == pytest.approx([expert.linear_fc2.weight.abs().double().mean().item()])
    experts[2].linear_fc2.weight.data.mul_(1.01)
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.down, expert 2: .*stale"):
        ternary.check()


def test_meters_count_tokens_losses_and_zeros_of_every_expert(alone):
    model, _ = _model(QSPARSE, BitNetConfig(enabled=True), **SHARED)
    meters, expert_meters = SparsityMeters(model.modules(), CPU), ExpertMeters(model.modules(), 2, 4, 1, CPU)
    batch, maps, operands = tokens(2), [], {}
    routers = [layer.mlp.router for layer in model.decoder.layers]
    hooks = [router.register_forward_hook(lambda module, _, output: maps.append(output[1])) for router in routers]
    for module in (m for m in model.modules() if getattr(m, "expert", None) is not None):
        observe = module.meter.observe

        def watched(operand, module=module, observe=observe):
            layer, projection = module.settings.name.split(".", 2)[1:]
            operands.setdefault((int(layer), module.expert, projection), []).append(operand)
            observe(operand)

        module.meter.observe = watched

    def forward():
        model(batch[:, :-1].contiguous(), torch.arange(SEQUENCE).expand(2, -1), None, labels=batch[:, 1:].contiguous())

    forward()
    assert all(router.meter.tokens is None for router in routers), "idle until started"
    maps.clear(), operands.clear()
    meters.start(), expert_meters.start()
    forward(), forward()
    model.eval()
    with meters.paused():
        forward()
    model.train()
    measured, total = expert_meters.stop(), meters.stop()
    assert {"mlp.gate_up", "mlp.down", "mlp.shared_gate_up", "mlp.shared_down"} < set(total)
    for layer in range(2):
        routed = maps[layer].sum(0).double()
        row = [measured[f"experts/layers.{layer}.{expert}/load"] for expert in range(4)]
        assert row == pytest.approx((routed / routed.sum()).tolist())
        assert measured[f"moe/layers.{layer}/load_max"] == max(row) and measured[f"moe/layers.{layer}/load_min"] == min(row)
        for expert in range(4):
            for projection in ("mlp.gate_up", "mlp.down"):
                seen = torch.cat(operands[layer, expert, projection][:2])
                zeros = (seen == 0).double().mean().item()
                assert measured[f"experts/layers.{layer}.{expert}/sparsity.{projection}"] == pytest.approx(zeros, abs=1e-12)
                assert zeros >= 0.5
    losses = [_naive_loss(model, layer, batch) for layer in range(2)]
    assert measured["moe/aux_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    for hook in hooks:
        hook.remove()
    assert expert_meters.stop() == measured, "stopped meters count nothing"


def _naive_loss(model, layer: int, batch) -> float:
    """Load-balancing loss of one layer from its router's logits."""
    seen = []
    router = model.decoder.layers[layer].mlp.router
    gating = router.gating
    router.gating = lambda x: seen.append(gating(x)) or seen[-1]
    model(batch[:, :-1].contiguous(), torch.arange(SEQUENCE).expand(2, -1), None, labels=batch[:, 1:].contiguous())
    del router.gating
    logits = seen[0].view(SEQUENCE, 2, 4)
    fractions = F.one_hot(logits.topk(2, dim=-1).indices, 4).sum(2).float().mean(0) / 2
    return (4 * (fractions * torch.softmax(logits, -1).mean(0)).sum(-1)).mean().item()
