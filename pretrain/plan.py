"""What a run would be, without starting anything: size, sparsity, memory, batch arithmetic, what lies in its directory, every problem.

    python -m pretrain.plan --config pretrain/configs/tiny_qsparse.yaml --world_size 16 [--section.field value ...]
    python -m pretrain.plan --suggest --nodes 8 --gpu h100-80 --config pretrain/configs/7b_qsparse.yaml --model.vocab_size 32000

The second ranks the layouts that fit a cluster. Exit status 0 where the run could start, or a layout fits, 2 where something must be
changed first.
"""

import sys

from data_tools.arguments import exit_status
from data_tools.manifest import Manifest
from megatron_qsparse.config import resolve
from megatron_qsparse.models.accounting import (
    activated_parameters,
    expected_sparsity,
    flops_per_token,
    parameters,
    projection_shapes,
)
from megatron_qsparse.models.config import ModelConfig
from megatron_qsparse.models.memory import checkpoint_bytes
from pretrain import launcher
from pretrain.arguments import make_parser, read, to_config
from pretrain.config import ConfigurationError, PretrainConfig
from pretrain.layouts import memory_of
from pretrain.outlook import look
from pretrain.suggest import command as suggest
from pretrain.validate import examine

GIB = 2**30


def main(args: list[str] | None = None) -> int:
    args = list(sys.argv[1:] if args is None else args)
    parser = make_parser(prog="python -m pretrain.plan", description=__doc__)
    try:
        suggest.add_arguments(parser)
        if mistake := suggest.misplaced(args):
            raise ConfigurationError(mistake)
        if suggest.FLAG in args:
            return suggest.main(parser, args)
        parser.add_argument("--world_size", type=int, default=launcher.world_size(), help="processes of the whole run")
        values = read(parser, args, more={"world_size": int, **suggest.TYPES})
    except ConfigurationError as error:
        print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return 2
    config, world_size = to_config(values), values["world_size"]
    problems, model, manifest = examine(config, world_size)
    for title, rows in sections(config, world_size, model, manifest):
        print(f"{title}\n{table(rows)}\n")
    complete = False
    if not problems:
        outlook = look(config, model, manifest)
        print(f"run directory\n{table(outlook.rows)}\n")
        for warning in outlook.warnings:
            print(f"warning: {warning}")
        problems, complete = outlook.problems, outlook.complete
    for problem in problems:
        print(f"problem: {problem}")
    fine = f"no problems found: this run {'is complete' if complete else 'can start'}"
    print(f"{len(problems)} problem{'s' if len(problems) != 1 else ''} found" if problems else fine)
    return 2 if problems else 0


def sections(config: PretrainConfig, world_size: int, model: ModelConfig | None, manifest: Manifest | None):
    """(title, rows) pairs of what can be said; parts that the problems make meaningless are left out."""
    if model is None:
        return
    try:
        yield "model", model_rows(config, model)
        yield "inputs kept: K x groups of the width", projection_rows(config, model)
        yield "batch", batch_rows(config, world_size, manifest)
        yield "memory of the fullest rank, activations estimated", memory_rows(config, world_size, model)
    except (ValueError, ZeroDivisionError) as error:
        # examine() names the setting; this only says why the table ends here.
        yield "the rest cannot be computed", [("reason", str(error))]


def model_rows(config: PretrainConfig, model: ModelConfig) -> list[tuple[str, str]]:
    count = parameters(model, subln=config.bitnet.subln)
    activated = activated_parameters(model, expected_sparsity(model, config.qsparse))
    rows = [
        ("shape", f"{model.num_layers} layers, hidden {model.hidden_size}, ffn {model.ffn_hidden_size}, {model.num_attention_heads} heads, "
                  f"{model.num_query_groups} query groups, vocabulary {model.vocab_size}, {model.activation}"),
        ("parameters", f"{count.total:,}: linears {count.linear:,}, embedding and head {count.embedding + count.head:,}"),
    ]  # fmt: skip
    if model.num_experts:
        shared, coefficient = model.moe_shared_expert_ffn_hidden_size, model.moe_aux_loss_coeff
        rows += [
            ("experts", f"{model.num_experts} in each layer, {model.moe_router_topk} for each token"
                        f"{f', and a shared one of width {shared}' if shared else ''}; load-balancing loss x {coefficient:g}"),
            ("for one token", f"{activated.linear:,} parameters of the linears, router {count.router:,}"),
        ]  # fmt: skip
    return [
        *rows,
        ("activated", f"{activated.total:,} of the linears{' and the router' if model.num_experts else ''} by the mask alone "
                      f"({100 * activated.sparsity:.1f} % skipped)"),
        ("flops", f"{flops_per_token(model, config.data.sequence_length).total:.3e} per token of training, dense"),
    ]  # fmt: skip


def projection_rows(config: PretrainConfig, model: ModelConfig) -> list[tuple[str, str]]:
    """One row for all layers of a projection that share their settings."""
    rows = []
    for projection, (_, width) in projection_shapes(model).items():
        kinds: dict[str, list[int]] = {}
        for layer in range(model.num_layers):
            settings = resolve(layer, model.num_layers, projection, width, config.qsparse, config.bitnet)
            mask = f"keeps {settings.k(width)} x {settings.groups} of {width}" if settings.sparse else f"dense, {width}"
            kinds.setdefault(mask + (", ternary x int8" if settings.quantized else "") + (", SubLN" if settings.subln else ""), []).append(
                layer
            )
        for text, layers in kinds.items():
            where = "" if len(kinds) == 1 else f" (layers {', '.join(map(str, layers))})"
            rows.append((projection, text + where))
    return rows


def batch_rows(config: PretrainConfig, world_size: int, manifest: Manifest | None) -> list[tuple[str, str]]:
    train, length = config.train, config.data.sequence_length
    data_parallel = max(1, world_size // (config.parallel.tensor * config.parallel.pipeline))
    tokens = train.global_batch_size * length
    expert = f", expert {config.parallel.expert}" if config.parallel.expert > 1 else ""
    micro_batches = train.global_batch_size / (train.micro_batch_size * data_parallel)
    rows = [
        ("processes", f"{world_size} = tensor {config.parallel.tensor} x pipeline {config.parallel.pipeline} x data {data_parallel}"
                      f"{expert}"),
        ("global batch", f"{train.global_batch_size} samples of {length} tokens = {tokens:,} tokens: {micro_batches:g} micro-batches of "
                         f"{train.micro_batch_size} on each rank"),
        ("run", f"{train.steps:,} steps = {train.steps * tokens:,} tokens"),
    ]  # fmt: skip
    if manifest is not None:
        available = manifest.tokens("train")
        rows.append(("data", f"{available:,} training tokens: {train.steps * tokens / available:.2f} epochs"))
        rows.append(("validation", validation_text(config, manifest)))
    return rows


def validation_text(config: PretrainConfig, manifest: Manifest) -> str:
    """How many samples are measured, which may be fewer than asked for, and when."""
    asked, batch, interval = config.validation.samples, config.train.global_batch_size, config.validation.interval
    found = sum((shard.tokens - 1) // config.data.sequence_length for shard in manifest.shards_of("validation"))
    used = max(batch, min(asked, found) // batch * batch)
    why = "" if used == asked else f" ({asked} asked for, {found} there, in whole batches of {batch})"
    return f"{used} samples{why}, {moments(interval, config.train.steps)}"


def moments(interval: int, steps: int) -> str:
    return f"every {interval:,} steps and after the last" if 0 < interval < steps else "after the last step only"


def memory_rows(config: PretrainConfig, world_size: int, model: ModelConfig) -> list[tuple[str, str]]:
    precision, memory = config.train.precision, memory_of(config, world_size, model)
    saved = checkpoint_bytes(model, precision, config.bitnet.subln)
    parts = ("weights", "gradients", "optimizer", "codes", "gathered", "activations", "total")
    interval, milestones = config.checkpoint.milestone_interval, []
    if interval > 0:
        number, size = config.train.steps // interval, checkpoint_bytes(model, precision, config.bitnet.subln, weights_only=True)
        milestones = [("milestones", f"{number} of {size / GIB:.3f} GiB, {number * size / GIB:.3f} GiB in the end, all kept")]
    saves = moments(config.checkpoint.interval, config.train.steps)
    if not 0 < config.checkpoint.interval < config.train.steps:
        begins = "begins again, since milestones hold no optimizer state" if interval > 0 else "begins again"
        saves = f"after the last step and on a signal only: a run that dies before {begins} (see checkpoint.interval)"
    return [
        *((name, f"{getattr(memory, name) / GIB:.3f} GiB") for name in parts),
        ("checkpoint", f"{saved / GIB:.3f} GiB each, {(config.checkpoint.keep_last + 1) * saved / GIB:.3f} GiB while a new one joins "
                       f"the {config.checkpoint.keep_last} kept"),
        ("saved", saves),
        *milestones,
    ]  # fmt: skip


def table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)


if __name__ == "__main__":
    sys.exit(exit_status(main))
