"""Settings that are right by themselves and do not go together: one strategy for each rule of `pretrain.validate`."""

from hypothesis import assume
from hypothesis import strategies as st

from tests.pretrain.wrong import LEAVES, Case, InFolder, Raw

EXPERTS = {"model.num_experts": 4, "model.ffn_hidden_size": Raw("null"), "model.moe_ffn_hidden_size": 64}
small = st.integers(1, 16)


@st.composite
def batch(draw) -> Case:
    micro, total, world = draw(small), draw(st.integers(1, 40)), draw(st.integers(1, 8))
    assume(total % (micro * world))
    names = ("train.global_batch_size", "train.micro_batch_size")
    return Case(dict(zip(names, (total, micro), strict=True)), names, world)


@st.composite
def processes(draw) -> Case:
    tensor, pipeline, world = draw(small), draw(small), draw(st.integers(0, 40))
    assume(world == 0 or world % (tensor * pipeline))
    changes = {"parallel.tensor": tensor, "parallel.pipeline": pipeline}
    return Case(changes, (f"{world} processes", *changes) if world else ("world_size=0",), world)


@st.composite
def tensor_parallel(draw) -> Case:
    """A width that the ranks do not divide."""
    name, value = draw(st.sampled_from([("model.num_attention_heads", 2), ("model.ffn_hidden_size", 130), ("model.vocab_size", 1001)]))
    tensor = draw(st.sampled_from([4, 8]))
    return Case({name: value, "parallel.tensor": tensor}, (name, f"parallel.tensor={tensor}"), tensor)


@st.composite
def query_groups(draw) -> Case:
    heads, groups = draw(st.sampled_from([(4, 3), (4, 8), (8, 5), (8, 6), (16, 12)]))
    return Case(
        {"model.num_attention_heads": heads, "model.num_query_groups": groups}, ("model.num_query_groups", "model.num_attention_heads")
    )


@st.composite
def heads(draw) -> Case:
    hidden, number = draw(st.integers(2, 200)), draw(st.integers(2, 32))
    assume(hidden % number or hidden // number % 2)
    return Case({"model.hidden_size": hidden, "model.num_attention_heads": number}, ("model.hidden_size", "model.num_attention_heads"))


@st.composite
def pipeline(draw) -> Case:
    layers, stages, chunks = draw(st.integers(1, 24)), draw(st.integers(2, 6)), draw(st.integers(1, 4))
    assume(layers % (stages * chunks))
    changes = {
        "model.num_layers": layers,
        "parallel.pipeline": stages,
        "parallel.virtual_pipeline": chunks,
        "train.global_batch_size": stages,
    }
    return Case(changes, ("model.num_layers", "parallel.pipeline"), stages)


@st.composite
def interleaving(draw) -> Case:
    stages, micro_batches = draw(st.sampled_from([2, 4])), draw(st.integers(1, 31))
    assume(micro_batches % stages)
    changes = {"model.num_layers": 8, "parallel.pipeline": stages, "parallel.virtual_pipeline": 2, "train.global_batch_size": micro_batches}
    return Case(changes, ("parallel.virtual_pipeline", "train.global_batch_size"), stages)


@st.composite
def zero(draw) -> Case:
    stages = draw(st.sampled_from([2, 4]))
    changes, named = draw(
        st.sampled_from(
            [
                ({"zero.stage": 3}, ("zero.stage=3", "parallel.pipeline")),
                ({"zero.stage": 2, "model.tied_embeddings": True}, ("zero.stage=2", "model.tied_embeddings=true")),
            ]
        )
    )
    return Case({"model.num_layers": 4, "parallel.pipeline": stages, **changes}, named, stages)


@st.composite
def sequence_parallel(draw) -> Case:
    length, tensor = draw(st.integers(3, 100)), draw(st.sampled_from([1, 2, 4]))
    assume(tensor == 1 or length % tensor)
    changes = {"parallel.sequence": True, "parallel.tensor": tensor, "data.sequence_length": length}
    return Case(changes, ("parallel.sequence=true", "parallel.tensor"), tensor)


@st.composite
def experts(draw) -> Case:
    extra, named, world = draw(
        st.sampled_from(
            [
                ({"parallel.expert": 3, "train.global_batch_size": 3}, ("model.num_experts=4", "parallel.expert=3"), 3),
                ({"parallel.expert": 4}, ("parallel.expert=4", "data-parallel"), 2),
                ({"parallel.tensor": 2}, ("parallel.sequence=false", "parallel.tensor=2"), 2),
                ({"zero.stage": 3, "parallel.expert": 2}, ("zero.stage=3", "parallel.expert=2"), 2),
                ({"model.moe_router_topk": 5}, ("model.moe_router_topk=5", "model.num_experts=4"), 1),
                ({"model.ffn_hidden_size": 128}, ("model.ffn_hidden_size=128", "model.moe_ffn_hidden_size=64"), 1),
                ({"model.moe_ffn_hidden_size": 65, "parallel.tensor": 2, "parallel.sequence": True}, ("model.moe_ffn_hidden_size=65",), 2),
            ]
        )
    )
    return Case({**EXPERTS, **extra}, named, world)


@st.composite
def no_experts(draw) -> Case:
    """Settings of experts in a dense model."""
    name, value = draw(
        st.sampled_from(
            [
                ("parallel.expert", 2), ("parallel.moe_token_dispatcher", "allgather"), ("model.moe_router_topk", 4),
                ("model.moe_ffn_hidden_size", 64), ("model.moe_shared_expert_ffn_hidden_size", 64), ("model.moe_aux_loss_coeff", 0.1),
            ]
        )
    )  # fmt: skip
    return Case({name: value}, (name, "no effect", "model.num_experts=0"), 2)


@st.composite
def warmup(draw) -> Case:
    kind = draw(st.sampled_from(["cosine", "linear", "polynomial"]))
    steps = draw(st.integers(1, 500))
    changes = {"schedule.kind": kind, "train.steps": steps, "schedule.warmup_steps": steps + draw(small)}
    return Case(changes, ("schedule.warmup_steps", "train.steps"))


@st.composite
def stable_then_decay(draw) -> Case:
    steps, warm, decay = draw(st.integers(1, 500)), draw(st.integers(0, 500)), draw(st.integers(0, 600))
    assume(decay == 0 or warm + decay > steps)
    changes = {"schedule.kind": "wsd", "train.steps": steps, "schedule.warmup_steps": warm, "schedule.decay_steps": decay}
    return Case(changes, ("schedule.decay_steps" if warm <= steps else "schedule.warmup_steps", "train.steps"))


@st.composite
def two_stages(draw) -> Case:
    lr = draw(st.floats(1e-6, 1e-2))
    second = draw(st.sampled_from([0.0, lr * 1.5, lr + 1e-3]))
    changes = {"schedule.kind": "two_stage", "optimizer.lr": lr, "schedule.second_lr": second}
    return Case(changes, ("schedule.second_lr", "optimizer.lr"))


@st.composite
def other_schedules(draw) -> Case:
    """A setting of another kind of schedule."""
    owners = {
        "power": ("polynomial",),
        "decay_steps": ("wsd",),
        "second_lr": ("two_stage",),
        "min_lr": ("cosine", "linear", "polynomial", "wsd"),
    }
    name, value = draw(st.sampled_from([("power", 2.0), ("decay_steps", 5), ("second_lr", 1e-4), ("min_lr", 1e-5)]))
    kind = draw(st.sampled_from(["cosine", "linear", "polynomial", "wsd", "two_stage"]).filter(lambda kind: kind not in owners[name]))
    needed = {"wsd": {"schedule.decay_steps": 10}, "two_stage": {"schedule.second_lr": 1e-5}}.get(kind, {})
    return Case({"schedule.kind": kind, **needed, f"schedule.{name}": value}, (f"schedule.{name}", "no effect", f"schedule.kind={kind}"))


@st.composite
def floor_of_the_rate(draw) -> Case:
    lr = draw(st.floats(1e-6, 1e-2))
    return Case({"optimizer.lr": lr, "schedule.min_lr": lr * draw(st.floats(1.01, 100))}, ("schedule.min_lr", "optimizer.lr"))


@st.composite
def groups(draw) -> Case:
    number, tensor = draw(st.integers(1, 300)), draw(st.sampled_from([1, 2, 4]))
    assume(64 % number or number % tensor)
    return Case({"qsparse.keep": 0.4, "qsparse.groups": number, "parallel.tensor": tensor}, (f"qsparse.groups={number}",), tensor)


@st.composite
def blocks(draw) -> Case:
    size, tensor = draw(st.integers(2, 300)), draw(st.sampled_from([1, 2, 4]))
    assume(64 % (size * tensor))
    changes = {"qsparse.keep": 0.4, "qsparse.mode": "block", "qsparse.block_m": size, "parallel.tensor": tensor}
    return Case(changes, (f"qsparse.block_m={size}",), tensor)


@st.composite
def n_of_m(draw) -> Case:
    n = draw(st.integers(1, 32).filter(lambda n: n != 16))
    return Case({"qsparse.keep": 0.5, "qsparse.mode": "block", "qsparse.block_n": n}, (f"qsparse.block_n={n}", "qsparse.keep=0.5"))


@st.composite
def other_modes(draw) -> Case:
    name, value, mode = draw(
        st.sampled_from([("groups", 4, "global"), ("groups", 4, "block"), ("block_m", 16, "groups"), ("block_n", 8, "global")])
    )
    return Case({"qsparse.keep": 0.4, "qsparse.mode": mode, f"qsparse.{name}": value}, (f"qsparse.{name}={value}", "no effect", mode))


@st.composite
def dense_after_all(draw) -> Case:
    """So little is left out that rounding leaves out nothing: slices of 8 features and more than 7.5 kept."""
    return Case({"qsparse.keep": draw(st.floats(0.97, 0.9999))}, ("keeps all 8 features", "qsparse.keep"))


@st.composite
def vocabulary(draw) -> Case:
    if draw(st.booleans()):
        return Case({"model.vocab_size": draw(st.integers(1, 511))}, ("model.vocab_size", "tokenizer"))
    return Case({"model.vocab_size": 1024, "model.vocab_multiple": draw(st.integers(1, 127))}, ("model.vocab_multiple", "model.vocab_size"))


@st.composite
def too_little_data(draw) -> Case:
    samples = draw(st.sampled_from([10**4, 10**5, 10**6]))
    if draw(st.booleans()):
        return Case({"train.global_batch_size": samples}, ("data.path", f"train.global_batch_size={samples}"))
    return Case({"data.sequence_length": samples}, ("data.path", f"data.sequence_length={samples}"))


@st.composite
def wide_codes(draw) -> Case:
    """More inputs than sums of codes are exact for."""
    width = draw(st.integers(132_105, 10**6)) // 8 * 8 + 8
    return Case({"bitnet.enabled": True, "model.ffn_hidden_size": width}, ("bitnet.enabled=true", "mlp.down", str(width)))


@st.composite
def resumption(draw) -> Case:
    changes, named = draw(
        st.sampled_from(
            [
                ({"resume": "required", "output_dir": InFolder("empty")}, ("resume=required", "output_dir")),
                ({"resume": "never", "allow_change": "train.steps"}, ("resume=never", "allow_change")),
            ]
        )
    )
    return Case(changes, named)


@st.composite
def rollback(draw) -> Case:
    """Checkpoints that do not reach back to before the spike."""
    interval, kept, patience = draw(st.integers(0, 50)), draw(st.integers(1, 5)), draw(small)
    back = max(0, (kept - 1) * interval - patience) + draw(small)
    changes = {"spike.action": "rollback", "spike.rollback_steps": back, "spike.patience": patience}
    named = ("checkpoint.interval", f"checkpoint.keep_last={kept}") if interval else ("spike.action=rollback", "checkpoint.interval")
    return Case({**changes, "checkpoint.interval": interval, "checkpoint.keep_last": kept}, named)


@st.composite
def without_effect(draw) -> Case:
    """Of something that is not on: who sets it believes that it is."""
    return Case({"train.check_codes": True, "qsparse.keep": draw(st.sampled_from([0.4, 1.0]))}, ("train.check_codes", "no effect"))


@st.composite
def typing_error(draw) -> Case:
    """A letter too many, too few, or two of them exchanged; in the section or in the name."""
    name = draw(st.sampled_from(sorted(LEAVES)))
    i = draw(st.integers(0, len(name) - 2))
    wrong = draw(st.sampled_from([name[:i] + name[i + 1 :], name[:i] + "q" + name[i:], name[:i] + name[i + 1] + name[i] + name[i + 2 :]]))
    section, _, last = wrong.rpartition(".")
    assume(wrong not in LEAVES and last and wrong.count(".") == name.count(".") and section not in ("tracking.tags",))
    return Case({wrong: 1}, ("no setting", "--help"))


COMBINATIONS = [
    batch, processes, tensor_parallel, query_groups, heads, pipeline, interleaving, zero, sequence_parallel, experts, no_experts, warmup,
    stable_then_decay, two_stages, other_schedules, floor_of_the_rate, groups, blocks, n_of_m, other_modes, dense_after_all, vocabulary,
    too_little_data, wide_codes, resumption, rollback, without_effect, typing_error,
]  # fmt: skip
