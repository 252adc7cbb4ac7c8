"""What a run must share with a checkpoint to go on from it: each difference is told, with both values."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from pretrain.config import parse
from pretrain.identity import differences, identity
from pretrain.validate import validate
from tests.pretrain.launch import TINY

SPARSE = ["--qsparse.keep", "0.4"]
BLOCK = [*SPARSE, "--qsparse.mode", "block", "--qsparse.block_m", "32"]
CHANGES = {
    "keep": (SPARSE, ["--qsparse.keep", "0.5"], ["qsparse.keep: 0.4 in the checkpoint, 0.5 now"]),
    "groups": (SPARSE, [*SPARSE, "--qsparse.groups", "4"], ["qsparse.groups: 8 in the checkpoint, 4 now"]),
    "mode": (SPARSE, [*SPARSE, "--qsparse.mode", "global"], ["qsparse.mode: groups in the checkpoint, global now"]),
    "block m": (BLOCK, [*BLOCK, "--qsparse.block_m", "16"], ["qsparse.block_m: 32 in the checkpoint, 16 now"]),
    "block n": (
        ["--qsparse.keep", "0.5", *BLOCK[2:], "--qsparse.block_n", "16"],
        ["--qsparse.keep", "0.25", *BLOCK[2:], "--qsparse.block_n", "8"],
        ["qsparse.block_n: 16 in the checkpoint, 8 now", "qsparse.keep: 0.5 in the checkpoint, 0.25 now"],
    ),
    "rescale": (SPARSE, [*SPARSE, "--qsparse.rescale", "l2"], ["qsparse.rescale: none in the checkpoint, l2 now"]),
    "bitnet": ([], ["--bitnet.enabled", "true"], ["bitnet.enabled: False in the checkpoint, True now"]),
    "subln": ([], ["--bitnet.subln", "true"], ["bitnet.subln: False in the checkpoint, True now"]),
    "precision": ([], ["--train.precision", "fp32"], ["train.precision: bf16 in the checkpoint, fp32 now"]),
    "seed": ([], ["--train.seed", "1"], ["train.seed: 0 in the checkpoint, 1 now"]),
    "width": ([], ["--model.hidden_size", "128"], ["model.hidden_size: 64 in the checkpoint, 128 now"]),
}


def _validated(shards, *arguments):
    batch = ["--train.micro_batch_size", "2", "--train.global_batch_size", "8", "--validation.samples", "16"]
    return validate(parse([*TINY, *batch, "--data.path", str(shards), *arguments]), world_size=1)


def _saved(run) -> dict:
    """As trainer.json gives it back."""
    return json.loads(json.dumps(identity(run)))


@pytest.mark.parametrize("change", CHANGES)
def test_what_defines_the_network_is_compared(shards, change):
    before, after, lines = CHANGES[change]
    found = differences(_saved(_validated(shards, *before)), _saved(_validated(shards, *after)))
    assert [line for line in lines if line not in found] == []


def test_layout_length_and_intervals_are_not(shards):
    other = [
        "--train.steps",
        "7",
        "--checkpoint.interval",
        "3",
        "--checkpoint.asynchronous",
        "false",
        "--zero.stage",
        "2",
        "--train.recompute",
        "true",
    ]
    assert differences(_saved(_validated(shards)), _saved(_validated(shards, *other))) == []


def test_another_k_from_the_same_settings_is_told(shards):
    """As a change of the rule that makes K from `keep` would bring about."""
    saved = _saved(_validated(shards, *SPARSE))
    changed = saved | {"kept.layers.0.mlp.down": [7, 8, 128]}
    assert differences(changed, saved) == ["kept.layers.0.mlp.down: [7, 8, 128] in the checkpoint, [6, 8, 128] now"]


def test_another_tokenizer_is_told(shards):
    run = _validated(shards)
    manifest = SimpleNamespace(digest=run.manifest.digest, tokenizer_sha256="0" * 64)
    other = dataclasses.replace(run, manifest=manifest)
    assert differences(_saved(run), _saved(other)) == [
        f"data.tokenizer: {run.manifest.tokenizer_sha256} in the checkpoint, {'0' * 64} now"
    ]  # fmt: skip


def test_a_setting_that_came_after_the_checkpoint_must_mean_what_was_done_before(shards):
    run = _saved(_validated(shards, "--bitnet.subln", "true", *SPARSE))
    older = {name: value for name, value in run.items() if name not in ("bitnet.subln", "qsparse.rescale", "model.num_experts")}
    assert differences(older, run) == ["bitnet.subln: not known when the checkpoint was written, True now"]
