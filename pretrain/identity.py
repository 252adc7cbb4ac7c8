"""What makes a run this run: settings and data that a checkpoint must share with the run that goes on from it."""

import dataclasses
from typing import TYPE_CHECKING

from data_tools.manifest import Manifest
from megatron_qsparse.config import BitNetConfig, QSparseConfig, resolve
from megatron_qsparse.models.accounting import projection_widths
from megatron_qsparse.models.config import ModelConfig
from pretrain.config import PretrainConfig, flatten

if TYPE_CHECKING:
    from pretrain.validate import Validated

NUMERICS_VERSION = 2
"""Raised whenever the same weights and samples give other losses than before; see CHANGELOG.md."""


def identity(run: "Validated") -> dict[str, object]:
    """Flat names and plain values, as stored in a checkpoint's trainer.json. Layout, length and intervals are not part of it."""
    return define(run.config, run.model, run.manifest)


def define(config: PretrainConfig, model: ModelConfig, manifest: Manifest) -> dict[str, object]:
    """`identity`, before everything is validated. model: resolved."""
    shape = dataclasses.asdict(model)
    del shape["preset"]
    return flatten(
        {
            "model": shape,
            "qsparse": dataclasses.asdict(config.qsparse),
            "bitnet": dataclasses.asdict(config.bitnet),
            "train": {"seed": config.train.seed, "global_batch_size": config.train.global_batch_size, "precision": config.train.precision},
            "data": {
                "sequence_length": config.data.sequence_length,
                "window_shards": config.data.window_shards,
                "manifest": manifest.digest,
                "tokenizer": manifest.tokenizer_sha256,
            },
            "kept": kept(config, model),
        }
    )


def kept(config: PretrainConfig, model: ModelConfig) -> dict[str, list[int]]:
    """[K, groups, width] of every sparse projection: what back ends and exporters take as given."""
    found = {}
    for projection, width in projection_widths(model).items():
        for layer in range(model.num_layers):
            settings = resolve(layer, model.num_layers, projection, width, config.qsparse, config.bitnet)
            if settings.sparse:
                found[settings.name] = [settings.k(width), settings.groups, width]
    return found


def differences(saved: dict[str, object], here: dict[str, object]) -> list[str]:
    """One line for each value of the checkpoint that this run does not share.

    A setting that the checkpoint does not know came later: its default means what was done before.
    """
    found = [name for name, value in saved.items() if here.get(name) != value]
    # K follows from the settings: it is worth a line only where they are the same and it still differs.
    named = [name for name in found if not name.startswith("kept.")] or found
    lines = [f"{name}: {saved[name]} in the checkpoint, {here.get(name)} now" for name in named]
    defaults = flatten(
        {
            "model": dataclasses.asdict(ModelConfig()),
            "qsparse": dataclasses.asdict(QSparseConfig()),
            "bitnet": dataclasses.asdict(BitNetConfig()),
        }
    )
    # Unset is 0 once a preset is applied.
    later = [name for name in here if name not in saved and name in defaults and (here[name] or None) != (defaults[name] or None)]
    return [*lines, *(f"{name}: not known when the checkpoint was written, {here[name]} now" for name in later)]
