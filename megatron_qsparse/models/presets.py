"""Named model shapes, and how a partly filled `ModelConfig` becomes a complete one.

The shapes are those of Q-Sparse's appendix B (arXiv 2407.10969): Llama layout, ReLU^2 GLU, plain multi-head attention, untied
head. The paper's GLU widths 2730 and 5460 cannot be cut into equal groups, blocks of 32 or tensor-parallel shards, so a
width that 256 does not divide is rounded up to the next multiple: 2730 -> 2816 and 5460 -> 5632.

The mixtures of experts are ours: 300m, whose GLU of 2816 is divided into 8 experts and a shared expert. For the same total, 8
experts of 256 and a shared one of 768 make 2816. For the same activated parameters, the 2 experts of a token, of 1024, and
the shared one of 768 do. The router adds 0.06 %. Counted are the layers' linears (see accounting.py).

Every width of every preset is divisible by 8, 16 and 32 groups, and by blocks of 32 on two tensor-parallel ranks (all but
tiny: on eight).
"""

from dataclasses import dataclass, replace
from difflib import get_close_matches

from megatron_qsparse.models.config import Activation, ModelConfig


@dataclass(frozen=True, kw_only=True)
class PaperSettings:
    """How Q-Sparse's authors trained this size from scratch (appendix B): for configurations to start from."""

    learning_rate: float
    """Peak for dense and Q-Sparse models in full precision."""
    bitnet_learning_rates: tuple[float, float]
    """Peaks of the two stages of 1.58-bit training; the second starts half-way (weight decay is 0 from there on)."""
    sequence_length: int = 2048
    """Tokens."""
    batch_tokens: int = 2048 * 256
    """Tokens of one optimizer step, the paper's "0.5M"."""
    steps: int = 100_000
    """Optimizer steps, 50B tokens."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A shape; its fields have the meaning of their namesakes in `ModelConfig`."""

    description: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    activation: Activation = "relu2_glu"
    num_experts: int = 0
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_ffn_hidden_size: int = 0
    paper: PaperSettings | None = None
    """None for shapes that are not the paper's."""


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        description="5 million parameters with a vocabulary of 4096: trains on a laptop in a minute; ours, not the paper's",
        num_layers=4, hidden_size=256, ffn_hidden_size=704, num_attention_heads=4,
    ),
    "300m": Preset(
        description="Q-Sparse 300M; GLU width rounded up from 2730 to 2816",
        num_layers=24, hidden_size=1024, ffn_hidden_size=2816, num_attention_heads=16,
        paper=PaperSettings(learning_rate=6e-4, bitnet_learning_rates=(1.8e-3, 1.5e-3)),
    ),
    "700m": Preset(
        description="Q-Sparse 700M",
        num_layers=24, hidden_size=1536, ffn_hidden_size=4096, num_attention_heads=24,
        paper=PaperSettings(learning_rate=2.5e-4, bitnet_learning_rates=(1.5e-3, 1e-3)),
    ),
    "1b3": Preset(
        description="Q-Sparse 1.3B; GLU width rounded up from 5460 to 5632",
        num_layers=24, hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=32,
        paper=PaperSettings(learning_rate=2e-4, bitnet_learning_rates=(1.2e-3, 8e-4)),
    ),
    "7b": Preset(
        description="Q-Sparse 7B",
        num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32,
        paper=PaperSettings(learning_rate=1.5e-4, bitnet_learning_rates=(1e-3, 6e-4)),
    ),
    "moe_300m_total": Preset(
        description="as many parameters as 300m in 8 experts of 256, two for each token, and a shared expert of 768; ours",
        num_layers=24, hidden_size=1024, ffn_hidden_size=2816, num_attention_heads=16,
        num_experts=8, moe_ffn_hidden_size=256, moe_shared_expert_ffn_hidden_size=768,
    ),
    "moe_300m_active": Preset(
        description="as many activated parameters as 300m: 8 experts of 1024, two for each token, and a shared expert of 768; ours",
        num_layers=24, hidden_size=1024, ffn_hidden_size=2816, num_attention_heads=16,
        num_experts=8, moe_ffn_hidden_size=1024, moe_shared_expert_ffn_hidden_size=768,
    ),
}  # fmt: skip

_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size", "vocab_multiple")


def apply_preset(config: ModelConfig, tokenizer_vocab_size: int | None) -> ModelConfig:
    """A copy of `config` with every unset field filled; what the user set stays as it is.

    tokenizer_vocab_size: number of token ids the data may hold, None where no tokenizer is known. `num_query_groups` unset
    means one per head. `vocab_size` unset means the tokenizer's, rounded up to `vocab_multiple`.
    Raises ValueError, naming the field and what to change, for an unknown preset, a shape that does not fit together, or a
    vocabulary that is missing or smaller than the tokenizer's.
    """
    preset = PRESETS.get(config.preset)
    if preset is None:
        close = get_close_matches(config.preset, PRESETS, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"model.preset={config.preset!r} is unknown, choose one of {', '.join(PRESETS)}{hint}")
    names = ("num_layers", "hidden_size", "num_attention_heads", "activation", "num_experts")
    filled = replace(config, **{name: getattr(preset, name) for name in names if getattr(config, name) is None})
    _fill_widths(filled, preset)
    if filled.num_query_groups is None:
        filled.num_query_groups = filled.num_attention_heads
    if config.vocab_size is not None and config.vocab_multiple != ModelConfig().vocab_multiple:
        raise ValueError(f"model.vocab_multiple={config.vocab_multiple} has no effect beside model.vocab_size={config.vocab_size}: "
                         "leave one of them out")  # fmt: skip
    if filled.vocab_size is None:
        filled.vocab_size = _rounded_vocabulary(filled, tokenizer_vocab_size)
    _check_shape(filled, tokenizer_vocab_size)
    return filled


def _fill_widths(config: ModelConfig, preset: Preset) -> None:
    """The widths of MLP, experts and shared expert. What the user set and no part of the model would use is refused."""
    dense, experts = config.ffn_hidden_size, config.moe_ffn_hidden_size
    if not config.num_experts:
        _refuse_expert_settings(config)
        config.ffn_hidden_size = preset.ffn_hidden_size if dense is None else dense
        config.moe_shared_expert_ffn_hidden_size = 0
        return
    if dense is not None and experts is not None and dense != experts:
        raise ValueError(f"model.ffn_hidden_size={dense} has no effect beside model.moe_ffn_hidden_size={experts}: every MLP consists of "
                         f"model.num_experts={config.num_experts} experts, so leave it out")  # fmt: skip
    widths = (experts, dense, preset.moe_ffn_hidden_size, preset.ffn_hidden_size)
    config.ffn_hidden_size = config.moe_ffn_hidden_size = next(width for width in widths if width is not None)
    if config.moe_shared_expert_ffn_hidden_size is None:
        config.moe_shared_expert_ffn_hidden_size = preset.moe_shared_expert_ffn_hidden_size


def _refuse_expert_settings(config: ModelConfig) -> None:
    defaults = ModelConfig()
    for name in ("moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_ffn_hidden_size", "moe_aux_loss_coeff"):
        value = getattr(config, name)
        if value != getattr(defaults, name) and not (name == "moe_shared_expert_ffn_hidden_size" and value == 0):
            raise ValueError(f"model.{name}={value} has no effect with model.num_experts=0: set model.num_experts or leave it out")


def _rounded_vocabulary(config: ModelConfig, tokenizer_vocab_size: int | None) -> int:
    if tokenizer_vocab_size is None:
        raise ValueError("model.vocab_size is not set and no tokenizer says it: set model.vocab_size, or data.path to tokenized shards")
    if config.vocab_multiple < 1:
        raise ValueError(f"model.vocab_multiple={config.vocab_multiple} must be at least 1")
    return -(-tokenizer_vocab_size // config.vocab_multiple) * config.vocab_multiple


def _check_shape(config: ModelConfig, tokenizer_vocab_size: int | None) -> None:
    if config.num_experts:
        _check_experts(config)
    for name in _SIZES:
        if getattr(config, name) < 1:
            raise ValueError(f"model.{name}={getattr(config, name)} must be at least 1")
    hidden, heads, groups = config.hidden_size, config.num_attention_heads, config.num_query_groups
    if hidden % heads:
        raise ValueError(f"model.hidden_size={hidden} is not divisible by model.num_attention_heads={heads}: change one of them")
    if hidden // heads % 2:
        raise ValueError(f"model.hidden_size={hidden} over model.num_attention_heads={heads} gives heads of {hidden // heads} features; "
                         "rotary embeddings turn pairs, so choose an even number")  # fmt: skip
    if heads % groups:
        raise ValueError(f"model.num_attention_heads={heads} is not divisible by model.num_query_groups={groups}: change one of them")
    if tokenizer_vocab_size is not None and config.vocab_size < tokenizer_vocab_size:
        raise ValueError(f"model.vocab_size={config.vocab_size} is smaller than the tokenizer's {tokenizer_vocab_size}: "
                         "leave model.vocab_size unset or raise it")  # fmt: skip


def _check_experts(config: ModelConfig) -> None:
    experts, chosen = config.num_experts, config.moe_router_topk
    if experts < 2:
        raise ValueError(f"model.num_experts={experts}: a mixture must have at least 2 experts, 0 is a dense MLP")
    if not 1 <= chosen <= experts:
        raise ValueError(f"model.moe_router_topk={chosen} must lie in 1 .. model.num_experts={experts}")
    if config.moe_ffn_hidden_size < 1:
        raise ValueError(f"model.moe_ffn_hidden_size={config.moe_ffn_hidden_size} must be at least 1")
    if config.moe_shared_expert_ffn_hidden_size < 0:
        raise ValueError(f"model.moe_shared_expert_ffn_hidden_size={config.moe_shared_expert_ffn_hidden_size} must not be negative")
    if not config.moe_aux_loss_coeff >= 0:
        raise ValueError(f"model.moe_aux_loss_coeff={config.moe_aux_loss_coeff} must not be negative")
