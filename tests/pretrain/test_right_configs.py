"""Not more is refused than must be: for every field other values that work, and what the repository ships."""

import json
from pathlib import Path

import pytest

import pretrain
from pretrain.config import dump_yaml, parse
from pretrain.settings import leaves
from pretrain.validate import examine, validate
from pretrain.validation.ranges import RANGES
from tests.pretrain import wrong
from tests.pretrain.combinations import EXPERTS

SPARSE = {"qsparse.keep": 0.4}
TENSOR, PIPELINE, ALL_FOUR = {"parallel.tensor": 2}, {"parallel.pipeline": 2}, 4
ROLLBACK = {"spike.action": "rollback", "checkpoint.interval": 100, "checkpoint.keep_last": 3}
Changes = dict[str, object]

RIGHT: dict[str, list] = {
    "model.preset": ["tiny", "300m", "moe_300m_active"],
    "model.num_layers": [1, 3, 96], "model.hidden_size": [8, 96, 4096], "model.ffn_hidden_size": [1, 130, 11008],
    "model.num_attention_heads": [1, 2, 32], "model.num_query_groups": [1, 2, 4], "model.activation": ["silu_glu", "relu2_glu"],
    "model.vocab_size": [512, 513, 10**6], "model.vocab_multiple": [1, 100, 1024], "model.tied_embeddings": [True],
    "model.rope_base": [1, 500000, 1e6], "model.norm_eps": [1e-6, 1e-12, 0.1], "model.init_std": [0.006, 1.0],
    "model.num_experts": [0, ({"model.num_experts": 2} | {"model.ffn_hidden_size": 32})],
    "model.moe_router_topk": [EXPERTS | {"model.moe_router_topk": k} for k in (1, 4)],
    "model.moe_ffn_hidden_size": [EXPERTS | {"model.moe_ffn_hidden_size": 32}],
    "model.moe_shared_expert_ffn_hidden_size": [EXPERTS | {"model.moe_shared_expert_ffn_hidden_size": width} for width in (0, 64)],
    "model.moe_aux_loss_coeff": [EXPERTS | {"model.moe_aux_loss_coeff": value} for value in (0, 1.0)],
    "qsparse.keep": [0.01, 0.5, 1, 1.0], "qsparse.mode": [SPARSE | {"qsparse.mode": mode} for mode in ("global", "block")],
    "qsparse.groups": [1, 4, SPARSE | {"qsparse.groups": 16}],
    "qsparse.block_n": [{"qsparse.keep": 0.5, "qsparse.mode": "block", "qsparse.block_n": 16}],
    "qsparse.block_m": [SPARSE | {"qsparse.mode": "block", "qsparse.block_m": size} for size in (2, 16, 64)],
    "qsparse.rescale": [SPARSE | {"qsparse.rescale": "l2"}],
    "qsparse.recipe": [[], [{"match": "layers.-1.*", "keep": 0.5}], [{"match": "*.down", "keep": 1, "bitnet": True}]],
    "bitnet.enabled": [True], "bitnet.subln": [True, {"bitnet.enabled": True, "bitnet.subln": True}],
    "parallel.tensor": [(TENSOR, 2), (TENSOR | SPARSE, ALL_FOUR)], "parallel.pipeline": [(PIPELINE, 2), (PIPELINE, ALL_FOUR)],
    "parallel.virtual_pipeline": [(PIPELINE | {"parallel.virtual_pipeline": 2, "model.num_layers": 4}, 2)],
    "parallel.sequence": [(TENSOR | {"parallel.sequence": True}, 2)],
    "parallel.expert": [(EXPERTS | {"parallel.expert": 2}, 2)],
    "parallel.moe_token_dispatcher": [EXPERTS | {"parallel.moe_token_dispatcher": "allgather"}],
    "zero.stage": [1, 2, 3, (PIPELINE | {"zero.stage": 2}, 2)],
    "data.path": [], "data.sequence_length": [1, 33, 64], "data.window_shards": [1, 1000], "data.workers": [1, 16],
    "train.steps": [1, 10**6, 2**31 - 1], "train.seed": [1, 1234567890123456789], "train.micro_batch_size": [1, 2, 4],
    "train.global_batch_size": [1, 3, 8], "train.precision": ["bf16", "fp32"], "train.deterministic": [True], "train.recompute": [True],
    "train.check_codes": [{"train.check_codes": True, "bitnet.enabled": True}],
    "train.max_skipped_steps": [1, 1000], "train.straggler_factor": [0, 1000.0], "train.log_interval": [1, 10**6],
    "train.hang_timeout_s": [0, 0.5, 86400],
    "spike.action": ["off", "warn", "stop", ROLLBACK],
    "spike.window": [8, 1000], "spike.threshold": [0.5, 1e6], "spike.min_increase": [0, 10], "spike.patience": [1, 100],
    "spike.rollback_steps": [ROLLBACK | {"spike.rollback_steps": 0}, 10**6],
    "spike.max_rollbacks": [ROLLBACK | {"spike.max_rollbacks": number} for number in (1, 100)],
    "optimizer.lr": [0, 1e-5, 1.0], "optimizer.beta1": [0, 0.999], "optimizer.beta2": [0, 0.9999], "optimizer.eps": [1e-15, 1e-6],
    "optimizer.weight_decay": [0, 1], "optimizer.clip": [0, 0.5, 1000],
    "schedule.kind": ["cosine", "linear", "polynomial"], "schedule.warmup_steps": [1, 1000], "schedule.min_lr": [1e-5, 3e-4],
    "schedule.power": [{"schedule.kind": "polynomial", "schedule.power": power} for power in (0.5, 2)],
    "schedule.decay_steps": [{"schedule.kind": "wsd", "schedule.decay_steps": steps} for steps in (1, 1000)],
    "schedule.second_lr": [{"schedule.kind": "two_stage", "schedule.second_lr": rate} for rate in (1e-4, 3e-4)],
    "validation.interval": [1, 10**6], "validation.samples": [1, 10**6],
    "checkpoint.interval": [1, 10**6], "checkpoint.keep_last": [1, 1000], "checkpoint.max_failures": [1, 100],
    "checkpoint.asynchronous": [False], "checkpoint.milestone_interval": [1, 10**6], "checkpoint.start_from": [""],
    "tracking.experiment": ["scaling", "a/b (c)", "\u00fcber"], "tracking.run_name": ["", "a", "a.b-c_d", "2024", "\u00e4 b"],
    "tracking.enabled": [True], "tracking.uri": [{"tracking.enabled": True, "tracking.uri": uri} for uri in ("http://host:5000", "sqlite:///a.db")],
    "tracking.system_metrics": [False], "tracking.system_metrics_interval_s": [0.1, 60, 86400], "tracking.drain_timeout_s": [0, 3600],
    "tracking.tags": [{}, {"a": "b"}, {"team/x.y": "two\nlines"}, {"1": "2"}],
    "notify.command": ["", "send_it", 'curl -s -d "$QSPARSE_EVENT: $QSPARSE_MESSAGE" https://host/hook || true', "a/b.sh 5"],
    "notify.timeout_s": [0.5, 1, 86400],
    "output_dir": ["runs/a", "/tmp/no/such/folder/yet", "a b", "runs/2024-01-01"],
    "resume": ["auto", "never"], "allow_change": ["train.steps", "optimizer,schedule", "schedule.min_lr, train"],
    "device": ["cpu", "cuda", "auto"], "format_version": [1],
}  # fmt: skip
"""field -> values that work with the rest of the base configuration, or whole changes, or (changes, processes)."""


def _problems(shards: Path, name: str, right: object, file: Path | None) -> list[str]:
    changes, world_size = right if isinstance(right, tuple) else (right, 1)
    if not (isinstance(changes, dict) and name in changes):
        changes = {name: changes}
    settings = {**wrong.base(str(shards)), **changes}
    args = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    if file is not None:
        # Words as people write them, without quotes.
        plain = {key: wrong.Raw(value) if isinstance(value, str) and value.isidentifier() else value for key, value in settings.items()}
        file.write_text(wrong.as_yaml(plain))
        args = ["--config", str(file)]
    return examine(parse(args), world_size)[0]


@pytest.mark.parametrize("in_file", [False, True])
def test_values_that_work_are_accepted(shards, tmp_path, in_file):
    file = tmp_path / "run.yaml" if in_file else None
    assert set(RIGHT) == set(wrong.LEAVES), "a new field needs values that work here, and some that do not in wrong.py"
    refused = {
        f"{name}: {right}": found for name, rights in RIGHT.items() for right in rights if (found := _problems(shards, name, right, file))
    }
    assert refused == {}


def test_plain_words_of_a_file_are_what_they_look_like(tmp_path):
    """PyYAML's words for false, numbers to the base of 60, dates."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "spike: {action: off}\ntracking: {run_name: 12:30:00, tags: {0x10: b, y: no, d: 2024-01-01, n: '1'}}\n"
        "train: {steps: 1_000, deterministic: True}\noptimizer: {lr: +.5}\nschedule: {min_lr: 1e-5}\n"
    )
    config = parse(["--config", str(file), "--tracking.tags.note", "ablation: keep 0.4", "--tracking.tags.n=5", "--tracking.tags.e="])
    assert (config.spike.action, config.tracking.run_name, config.train.steps, config.train.deterministic) == (
        "off",
        "12:30:00",
        1000,
        True,
    )
    assert (config.optimizer.lr, config.schedule.min_lr) == (0.5, 1e-5)
    assert config.tracking.tags == {"0x10": "b", "y": "no", "d": "2024-01-01", "n": "5", "note": "ablation: keep 0.4", "e": ""}
    config.tracking.run_name, config.tracking.experiment = "1e5", "off"
    file.write_text(dump_yaml(config))
    assert parse(["--config", str(file)]) == config


def test_the_configuration_that_is_printed_is_the_one_that_was_said(tmp_path, capsys):
    said = ["--tracking.tags.note", "a: b", "--train.steps", "7", "--spike.action", "off"]
    with pytest.raises(SystemExit) as caught:
        parse([*said, "--print_config"])
    assert caught.value.code == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert parse(["--config", str(tmp_path / "run.yaml")]) == parse(said)


def test_the_base_of_all_wrong_configurations_is_right(shards, tmp_path):
    wrong.prepare(tmp_path)
    for in_file in (False, True):
        assert wrong.outcome(wrong.Case({}, ()), str(shards), tmp_path, in_file) == ""


@pytest.mark.parametrize("config", sorted((Path(pretrain.__file__).parent / "configs").glob("tiny_*.yaml")), ids=lambda path: path.stem)
def test_the_small_configurations_of_the_repository_are_right(config, shards, tmp_path):
    args = ["--config", str(config), "--data.path", str(shards), "--data.sequence_length", "32", "--output_dir", str(tmp_path / "run")]
    validated = validate(parse(args), 2)
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump_yaml(validated.config))
    assert parse(["--config", str(saved)]) == validated.config


def test_every_range_belongs_to_a_field():
    assert set(RANGES) <= set(wrong.LEAVES) == set(leaves(type(parse([]))))
