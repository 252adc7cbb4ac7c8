"""Models whose parameters can be counted by hand."""

from megatron_qsparse.config import BitNetConfig, QSparseConfig
from megatron_qsparse.models.config import ModelConfig
from megatron_qsparse.models.presets import apply_preset

MISTRAL = apply_preset(
    ModelConfig(
        preset="7b", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
        activation="silu_glu", vocab_size=32000,
    ),
    None,
)  # fmt: skip
# hidden 8, 4 heads of 2 features, 2 key/value heads, GLU width 12, 3 layers, vocabulary 10.
SMALL = apply_preset(
    ModelConfig(num_layers=3, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4, num_query_groups=2, vocab_size=10), None
)
QKV, PROJ, GATE_UP, DOWN = (8 + 2 * 4) * 8, 8 * 8, 24 * 8, 8 * 12
LINEAR = 3 * (QKV + PROJ + GATE_UP + DOWN)
DENSE = (QSparseConfig(), BitNetConfig())
# As SMALL, but 4 experts of width 6, two for a token, and a shared one of 10.
MIXTURE = apply_preset(
    ModelConfig(
        num_layers=3, hidden_size=8, num_attention_heads=4, num_query_groups=2, vocab_size=10,
        num_experts=4, moe_ffn_hidden_size=6, moe_shared_expert_ffn_hidden_size=10,
    ),
    None,
)  # fmt: skip
EXPERT, SHARED, ROUTER = (12 * 8, 8 * 6), (20 * 8, 8 * 10), 4 * 8
