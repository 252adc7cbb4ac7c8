"""Every problem that `validate` knows: it is found, names the field and says what to do; nothing is reported without cause."""

import os
import shutil
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest

import pretrain
from megatron_qsparse.config import RecipeRule
from pretrain.config import PretrainConfig
from pretrain.validate import ConfigurationError, examine, validate


def _config(shards: Path | str, **changes) -> PretrainConfig:
    """A configuration that works on one or two processes, with `section.field` changes written as `section__field`."""
    config = PretrainConfig()
    settings = {
        "data__path": str(shards), "data__sequence_length": 32, "train__global_batch_size": 4, "tracking__enabled": False,
        "model__num_layers": 2, "model__hidden_size": 64, "model__ffn_hidden_size": 128, "model__num_attention_heads": 4,
    }  # fmt: skip
    for name, value in {**settings, **changes}.items():
        *sections, field = name.split("__")
        target = reduce(getattr, sections, config)
        assert hasattr(target, field), name
        setattr(target, field, value)
    return config


def test_a_good_configuration_has_no_problems_and_its_arithmetic(shards):
    for world_size, data_parallel, micro_batches in ((1, 1, 4), (2, 2, 2), (4, 4, 1)):
        found = validate(_config(shards), world_size)
        assert (found.data_parallel, found.num_micro_batches) == (data_parallel, micro_batches)
        assert found.model.vocab_size % 128 == 0 and found.model.num_query_groups == 4
    found = validate(_config(shards, parallel__tensor=2, train__micro_batch_size=2, zero__stage=3), 4)
    assert (found.data_parallel, found.num_micro_batches) == (2, 1)


EXPERTS = {"model__num_experts": 4, "model__ffn_hidden_size": None, "model__moe_ffn_hidden_size": 64}
SEQUENCE_PARALLEL = {"parallel__tensor": 2, "parallel__sequence": True}

# changes, world size, words that the one message must hold: the field, its value, what it collides with or the remedy.
PROBLEMS = [
    ({"train__steps": 0}, 1, ["train.steps=0", "at least 1"]),
    ({"train__micro_batch_size": 0}, 1, ["train.micro_batch_size=0", "at least 1"]),
    ({"train__log_interval": 0}, 1, ["train.log_interval=0", "at least 1"]),
    ({"data__window_shards": 0}, 1, ["data.window_shards=0", "at least 1"]),
    ({"parallel__tensor": 0}, 1, ["parallel.tensor=0", "at least 1"]),
    ({"parallel__pipeline": -1}, 1, ["parallel.pipeline=-1", "at least 1"]),
    ({"parallel__virtual_pipeline": 0}, 1, ["parallel.virtual_pipeline=0", "at least 1"]),
    ({"parallel__virtual_pipeline": 2}, 1, ["parallel.virtual_pipeline=2", "no effect", "parallel.pipeline=1"]),
    ({"parallel__virtual_pipeline": 2, "parallel__pipeline": 2}, 2, ["model.num_layers=2", "parallel.virtual_pipeline=2", "4 chunks"]),
    ({"parallel__virtual_pipeline": 2, "parallel__pipeline": 2, "model__num_layers": 4, "train__global_batch_size": 3}, 2,
     ["parallel.virtual_pipeline=2", "the 3 micro-batches", "parallel.pipeline=2", "train.global_batch_size"]),
    ({"parallel__expert": 0}, 1, ["parallel.expert=0", "at least 1"]),
    ({"checkpoint__keep_last": 0}, 1, ["checkpoint.keep_last=0", "at least 1"]),
    ({"validation__samples": 0}, 1, ["validation.samples=0", "at least 1"]),
    ({"train__seed": -1}, 1, ["train.seed=-1", "negative"]),
    ({"data__workers": -1}, 1, ["data.workers=-1", "negative"]),
    ({"validation__interval": -1}, 1, ["validation.interval=-1", "negative"]),
    ({"checkpoint__interval": -1}, 1, ["checkpoint.interval=-1", "negative"]),
    ({"optimizer__lr": -1e-3}, 1, ["optimizer.lr=-0.001", "negative"]),
    ({"optimizer__eps": -1.0}, 1, ["optimizer.eps=-1.0", "(0, 1]"]),
    ({"optimizer__weight_decay": float("nan")}, 1, ["optimizer.weight_decay=nan", "negative"]),
    ({"optimizer__clip": -1.0}, 1, ["optimizer.clip=-1.0", "negative"]),
    ({"schedule__warmup_steps": -1}, 1, ["schedule.warmup_steps=-1", "negative"]),
    ({"optimizer__beta1": 1.0}, 1, ["optimizer.beta1=1.0", "[0, 1)"]),
    ({"optimizer__beta2": -0.1}, 1, ["optimizer.beta2=-0.1", "[0, 1)"]),
    ({"format_version": 2}, 1, ["format_version=2", "newer version", "up to 1"]),
    ({"zero__stage": 0}, 1, ["zero.stage=0", "fp32 accumulation", "use 1, 2 or 3"]),
    ({"zero__stage": 4}, 1, ["zero.stage=4", "use 1, 2 or 3"]),
    ({"zero__stage": 3, "parallel__pipeline": 2}, 2, ["zero.stage=3", "parallel.pipeline=2", "use zero.stage=1 or 2"]),
    ({"parallel__expert": 2}, 1, ["parallel.expert=2", "no effect", "model.num_experts=0"]),
    ({"parallel__moe_token_dispatcher": "allgather"}, 1, ["parallel.moe_token_dispatcher=allgather", "no effect", "model.num_experts=0"]),
    ({**EXPERTS, "parallel__expert": 3, "train__global_batch_size": 3}, 3, ["model.num_experts=4", "parallel.expert=3"]),
    ({**EXPERTS, "parallel__expert": 4}, 2, ["parallel.expert=4", "does not divide the 2 data-parallel ranks", "2 processes"]),
    ({**EXPERTS, "parallel__expert": 2, "parallel__pipeline": 2}, 2, ["parallel.expert=2", "1 data-parallel ranks", "parallel.pipeline=2"]),
    ({**EXPERTS, "parallel__tensor": 2}, 2, ["parallel.sequence=false", "parallel.tensor=2", "set parallel.sequence=true"]),
    ({**EXPERTS, **SEQUENCE_PARALLEL, "model__moe_ffn_hidden_size": 65}, 2, ["model.moe_ffn_hidden_size=65", "parallel.tensor=2"]),
    ({**EXPERTS, **SEQUENCE_PARALLEL, "model__moe_shared_expert_ffn_hidden_size": 33}, 2,
     ["model.moe_shared_expert_ffn_hidden_size=33", "parallel.tensor=2"]),
    ({**EXPERTS, "qsparse__keep": 0.5, "model__moe_shared_expert_ffn_hidden_size": 36}, 1,
     ["qsparse.groups=8", "36 input features of mlp.shared_down"]),
    ({"qsparse__recipe": [RecipeRule(match="*.shared_down", keep=0.5)]}, 1, ["qsparse.recipe[0].match='*.shared_down'", "matches no"]),
    ({"model__hidden_size": 96, "model__num_attention_heads": 12, "model__num_query_groups": 2, "model__ffn_hidden_size": 192,
      "model__vocab_size": 516, "parallel__tensor": 6}, 6,
     ["128 outputs of attention.qkv", "model.num_query_groups=2", "parallel.tensor=6"]),
    ({"parallel__sequence": True}, 1, ["parallel.sequence=true", "raise parallel.tensor"]),
    ({"parallel__tensor": 2}, 3, ["3 processes", "parallel.tensor=2", "start a multiple of 2"]),
    ({"train__global_batch_size": 6, "train__micro_batch_size": 2}, 2, ["train.global_batch_size=6", "train.micro_batch_size=2", "= 4"]),
    ({"parallel__sequence": True, "parallel__tensor": 2, "data__sequence_length": 33}, 2,
     ["data.sequence_length=33", "parallel.tensor=2", "parallel.sequence=true"]),
    ({"schedule__warmup_steps": 2000}, 1, ["schedule.warmup_steps=2000", "train.steps=1000"]),
    ({"schedule__min_lr": 1.0}, 1, ["schedule.min_lr=1.0", "optimizer.lr=0.0003"]),
    ({"schedule__power": 2.0}, 1, ["schedule.power=2.0", "no effect", "schedule.kind=cosine", "polynomial"]),
    ({"schedule__decay_steps": 5}, 1, ["schedule.decay_steps=5", "no effect", "wsd"]),
    ({"schedule__second_lr": 1e-4}, 1, ["schedule.second_lr=0.0001", "no effect", "two_stage"]),
    ({"schedule__kind": "two_stage", "schedule__second_lr": 1e-4, "schedule__min_lr": 1e-5}, 1, ["schedule.min_lr=1e-05", "no effect"]),
    ({"schedule__kind": "wsd"}, 1, ["schedule.decay_steps=0", "1 .. train.steps=1000"]),
    ({"schedule__kind": "wsd", "schedule__decay_steps": 600, "schedule__warmup_steps": 500}, 1,
     ["schedule.warmup_steps=500", "schedule.decay_steps=600", "overlap", "shorten"]),
    ({"schedule__kind": "two_stage"}, 1, ["schedule.second_lr=0.0", "(0, optimizer.lr=0.0003]"]),
    ({"schedule__kind": "two_stage", "schedule__second_lr": 1e-4, "schedule__warmup_steps": 501}, 1,
     ["schedule.warmup_steps=501", "second stage", "step 500", "shorten"]),
    ({"schedule__kind": "polynomial", "schedule__power": 0.0}, 1, ["schedule.power=0.0", "(0, 1000]"]),
    ({"model__num_attention_heads": 2, "parallel__tensor": 4}, 4, ["model.num_attention_heads=2", "parallel.tensor=4"]),
    ({"model__ffn_hidden_size": 130, "parallel__tensor": 4}, 4, ["model.ffn_hidden_size=130", "parallel.tensor=4"]),
    ({"model__vocab_size": 1002, "parallel__tensor": 4}, 4, ["model.vocab_size=1002", "parallel.tensor=4"]),
    ({"model__num_layers": 3, "parallel__pipeline": 2}, 2, ["model.num_layers=3", "parallel.pipeline=2"]),
    ({"model__tied_embeddings": True, "parallel__pipeline": 2, "zero__stage": 2}, 2, ["zero.stage=2", "tied", "use zero.stage=1"]),
    ({**EXPERTS, "model__moe_router_topk": 5}, 1, ["model.moe_router_topk=5", "1 .. model.num_experts=4"]),
    ({"model__moe_router_topk": 1}, 1, ["model.moe_router_topk=1", "no effect", "model.num_experts=0"]),
    ({"model__moe_aux_loss_coeff": 0.0}, 1, ["model.moe_aux_loss_coeff=0.0", "no effect", "model.num_experts=0"]),
    ({"model__preset": "tinny"}, 1, ["model.preset='tinny'", "did you mean 'tiny'"]),
    ({"model__vocab_size": 100}, 1, ["model.vocab_size=100", "tokenizer's", "raise it"]),
    ({"model__num_query_groups": 3}, 1, ["model.num_attention_heads=4", "model.num_query_groups=3", "change one"]),
    ({"model__num_attention_heads": 8, "model__num_query_groups": 4, "model__vocab_size": 1026, "parallel__tensor": 2}, 1,
     ["1 processes", "parallel.tensor=2"]),
    ({"model__num_attention_heads": 6, "model__hidden_size": 96, "model__num_query_groups": 3, "parallel__tensor": 2}, 2,
     ["model.num_query_groups=3", "parallel.tensor=2", "one must divide"]),
    ({"model__hidden_size": 66}, 1, ["model.hidden_size=66", "model.num_attention_heads=4", "change one"]),
    ({"qsparse__keep": 0.0}, 1, ["qsparse.keep=0.0", "(0, 1]", "1.0 is dense"]),
    ({"qsparse__recipe": [RecipeRule(match="*.down", keep=1.5)]}, 1, ["qsparse.recipe[0].keep=1.5", "(0, 1]"]),
    ({"qsparse__recipe": [RecipeRule(match="layer.0.*", keep=1.0)]}, 1, ["qsparse.recipe[0].match='layer.0.*'", "layers.0.mlp.down"]),
    ({"qsparse__recipe": [RecipeRule(match="*.down")]}, 1, ["qsparse.recipe[0].match='*.down'", "changes nothing", "keep or a bitnet"]),
    ({"qsparse__recipe": [RecipeRule(match="*", keep=1.0), RecipeRule(match="*.down", bitnet=False)]}, 1,
     ["qsparse.recipe[1].match='*.down'", "never reached", "move it up"]),
    ({"qsparse__keep": 0.5, "qsparse__mode": "global", "qsparse__groups": 4}, 1, ["qsparse.groups=4", "no effect", "qsparse.mode=groups"]),
    ({"qsparse__keep": 0.5, "qsparse__block_m": 16}, 1, ["qsparse.block_m=16", "no effect", "qsparse.mode=block"]),
    ({"qsparse__groups": 0}, 1, ["qsparse.groups=0", "at least 1"]),
    ({"qsparse__keep": 0.5, "qsparse__groups": 1, "parallel__tensor": 2}, 2, ["qsparse.groups=1", "parallel.tensor=2", "before training"]),
    ({"qsparse__keep": 0.5, "model__ffn_hidden_size": 132}, 1, ["qsparse.groups=8", "132 input features of mlp.down"]),
    ({"qsparse__keep": 0.5, "qsparse__mode": "block", "model__ffn_hidden_size": 160, "parallel__tensor": 2}, 2,
     ["qsparse.block_m=32", "160/2 input features of mlp.down"]),
    ({"qsparse__keep": 0.5, "qsparse__block_n": 16}, 1, ["qsparse.block_n=16", "no effect", "qsparse.mode=block"]),
    ({"qsparse__keep": 0.5, "qsparse__mode": "block", "qsparse__block_n": 8}, 1, ["qsparse.block_n=8", "qsparse.keep=0.25"]),
    ({"tracking__experiment": ""}, 1, ["tracking.experiment", "name"]),
    ({"data__path": ""}, 1, ["data.path is not set", "data_tools tokenize"]),
    ({"data__path": "no/such/place"}, 1, ["data.path", "no/such/place", "data_tools tokenize"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "world_size", "words"), PROBLEMS, ids=[str(list(changes)) for changes, _, _ in PROBLEMS])
def test_each_problem_is_found_alone_and_in_words(shards, changes, world_size, words):
    problems, _, _ = examine(_config(shards, **changes), world_size)
    assert len(problems) == 1, problems
    for word in words:
        assert word in problems[0], problems[0]


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({}, 1), ({"zero__stage": 3}, 2), ({"parallel__expert": 2}, 2), ({"parallel__expert": 4, "zero__stage": 2}, 4),
        ({"parallel__moe_token_dispatcher": "allgather"}, 2),
        ({**SEQUENCE_PARALLEL, "parallel__expert": 2, "qsparse__keep": 0.5}, 4), ({"parallel__pipeline": 2, "parallel__expert": 2}, 4),
        ({"qsparse__recipe": [RecipeRule(match="*.shared_down", keep=0.5)], "model__moe_shared_expert_ffn_hidden_size": 64}, 1),
    ],
    ids=str,
)  # fmt: skip
def test_layouts_of_experts(shards, changes, world_size):
    assert examine(_config(shards, **{**EXPERTS, **changes}), world_size)[0] == []


def test_experts_that_are_spread_cannot_be_sharded_by_zero_3(shards):
    problems, _, _ = examine(_config(shards, **EXPERTS, zero__stage=3, parallel__expert=2), 2)
    assert any(all(word in problem for word in ("zero.stage=3", "parallel.expert=2", "zero.stage=1 or 2")) for problem in problems)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_too_few_samples_for_one_batch_name_the_split(shards, split):
    fits = 1
    while not examine(_config(shards, train__global_batch_size=fits), 1)[0]:
        fits += 1
    problems, _, _ = examine(_config(shards, train__global_batch_size=fits * 100), 1)
    mine = [problem for problem in problems if f"the {split} split" in problem]
    assert len(mine) == 1
    assert "data.sequence_length=32" in mine[0] and f"train.global_batch_size={fits * 100}" in mine[0] and "add data" in mine[0]


def test_a_missing_or_cut_shard_is_named(shards, tmp_path):
    for number, harm in enumerate((Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-512]))):
        copy = tmp_path / str(number)
        shutil.copytree(shards, copy)
        shard = sorted(copy.glob("*train*.tar") or copy.rglob("*.tar"))[0]
        harm(shard)
        problems, _, _ = examine(_config(copy), 1)
        assert len(problems) == 1 and problems[0].startswith("data.path: ") and shard.name in problems[0]


def test_a_missing_vocabulary_is_not_reported_beside_missing_data():
    problems, model, manifest = examine(_config("", model__vocab_size=None), 1)
    assert len(problems) == 1 and "data.path" in problems[0] and model is None and manifest is None


def test_all_problems_are_told_at_once(shards):
    config = _config(shards, zero__stage=0, train__steps=0, qsparse__keep=2.0)
    with pytest.raises(ConfigurationError) as caught:
        validate(config, 1)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and all(any(field in line for line in lines) for field in ("zero.stage", "train.steps", "qsparse.keep"))


def test_checking_needs_no_torch(shards):
    """`plan` and a refused start answer at once, and on machines without the training libraries."""
    script = (
        "import sys\n"
        "from pretrain.config import PretrainConfig\n"
        "from pretrain.validate import examine\n"
        "config = PretrainConfig()\n"
        f"config.data.path, config.data.sequence_length = {str(shards)!r}, 32\n"
        "assert examine(config, 2)[0] == [], examine(config, 2)[0]\n"
        "print(sorted({'torch', 'megatron', 'deepspeed', 'mlflow'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(pretrain.__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr
