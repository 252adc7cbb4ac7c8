"""What the settings mean for one projection, and what is refused."""

from fractions import Fraction

import pytest

from megatron_qsparse.config import PROJECTIONS, ROW_PROJECTIONS, BitNetConfig, QSparseConfig, RecipeRule, problems, resolve

WIDTHS = {"attention.qkv": 256, "attention.proj": 256, "mlp.gate_up": 256, "mlp.down": 704}


def _resolve(projection, layer=1, qsparse=None, bitnet=None):
    return resolve(layer, 4, projection, WIDTHS[projection], qsparse or QSparseConfig(), bitnet or BitNetConfig())


def _problems(tensor_parallel=1, bitnet=None, **fields):
    return problems(QSparseConfig(**fields), bitnet or BitNetConfig(), WIDTHS, 4, tensor_parallel)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_defaults_are_dense(projection):
    settings = _resolve(projection)
    assert not settings.sparse and not settings.quantized and not settings.subln and not settings.rescale
    assert settings.name == f"layers.1.{projection}"
    assert settings.k(WIDTHS[projection]) * settings.groups == WIDTHS[projection]


@pytest.mark.parametrize(
    ("mode", "kept"),
    [
        # Features kept per token: whole width for column inputs, eight slices of 32 and 88 for row inputs.
        ("groups", {"attention.qkv": 102, "attention.proj": 8 * 13, "mlp.gate_up": 102, "mlp.down": 8 * 35}),
        ("global", {"attention.qkv": 102, "attention.proj": 102, "mlp.gate_up": 102, "mlp.down": 282}),
        ("block", {"attention.qkv": 8 * 13, "attention.proj": 8 * 13, "mlp.gate_up": 8 * 13, "mlp.down": 22 * 13}),
    ],
)
def test_modes(mode, kept):
    for projection, width in WIDTHS.items():
        settings = _resolve(projection, qsparse=QSparseConfig(keep=0.4, mode=mode))
        assert settings.k(width) * settings.groups == kept[projection]


def test_keep_is_an_exact_decimal():
    assert _resolve("mlp.down", qsparse=QSparseConfig(keep=0.7)).keep == Fraction(7, 10)


def test_subln_stands_before_the_row_projections_only():
    bitnet = BitNetConfig(enabled=True, subln=True)
    for projection in PROJECTIONS:
        settings = _resolve(projection, bitnet=bitnet)
        assert settings.quantized
        assert settings.subln == (projection in ROW_PROJECTIONS)


def test_rescale_is_for_masked_projections():
    qsparse = QSparseConfig(keep=0.5, rescale="l2", recipe=[RecipeRule(match="*.mlp.down", keep=1.0)])
    assert _resolve("mlp.gate_up", qsparse=qsparse).rescale
    assert not _resolve("mlp.down", qsparse=qsparse).rescale


def test_the_first_rule_that_matches_wins():
    recipe = [
        RecipeRule(match="layers.0.*", keep=1.0),
        RecipeRule(match="layers.-1.mlp.*", keep=0.25, bitnet=False),
        RecipeRule(match="*.mlp.down", bitnet=False),
        RecipeRule(match="layers.*", keep=0.6),
    ]
    qsparse, bitnet = QSparseConfig(keep=0.5, recipe=recipe), BitNetConfig(enabled=True)

    def of(layer, projection):
        settings = _resolve(projection, layer, qsparse, bitnet)
        return float(settings.keep), settings.quantized

    assert of(0, "mlp.down") == (1.0, True)
    assert of(3, "mlp.down") == (0.25, False)
    # A rule that says nothing about keep leaves it at qsparse.keep: later rules are not consulted.
    assert of(1, "mlp.down") == (0.5, False)
    assert of(3, "attention.qkv") == (0.6, True)


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8])
def test_nothing_to_complain_about(tensor_parallel):
    assert not _problems(tensor_parallel)
    assert not _problems(tensor_parallel, keep=0.4)
    assert not _problems(tensor_parallel, keep=0.4, mode="global")


@pytest.mark.parametrize("qsparse", [QSparseConfig(keep=0.5, groups=96), QSparseConfig(keep=0.5, mode="block", block_m=96)])
def test_slices_that_do_not_fit_are_no_other_slices(qsparse):
    """Whoever builds a layer without asking `problems` must not get 7 slices of 100 features for 7.3 of 96."""
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down: qsparse.*=96 does not divide its 704 input features"):
        _resolve("mlp.down", qsparse=qsparse)
    assert not _resolve("mlp.down", qsparse=QSparseConfig(groups=96)).sparse


def test_blocks_fit():
    assert not _problems(2, keep=0.5, mode="block")
    assert not _problems(1, keep=0.5, mode="block", block_n=16)
    assert not _problems(1, keep=0.5, mode="block", block_n=2, block_m=4)


def test_groups_are_of_no_concern_to_a_dense_model():
    assert not _problems(3, groups=7)
    # Nor where only inputs that every rank holds whole are sparse.
    assert not _problems(3, recipe=[RecipeRule(match="*.qkv", keep=0.5)])


@pytest.mark.parametrize(
    ("fields", "tensor_parallel", "words"),
    [
        ({"keep": 0.0}, 1, ["qsparse.keep=0.0", "(0, 1]"]),
        ({"keep": 1.5}, 1, ["qsparse.keep=1.5"]),
        ({"keep": float("nan")}, 1, ["qsparse.keep=nan"]),
        ({"recipe": [RecipeRule(match="*", keep=-1.0)]}, 1, ["qsparse.recipe[0].keep=-1.0"]),
        ({"recipe": [RecipeRule(match="*.mlp.dwon", keep=0.5)]}, 1, ["qsparse.recipe[0].match='*.mlp.dwon'", "layers.0.mlp.down"]),
        ({"recipe": [RecipeRule(match="layers.4.*", keep=0.5)]}, 1, ["matches no projection"]),
        ({"keep": 0.5, "groups": 0}, 1, ["qsparse.groups=0"]),
        ({"keep": 0.5, "groups": 8}, 3, ["qsparse.groups=8", "parallel.tensor=3"]),
        ({"keep": 0.5, "groups": 128}, 1, ["qsparse.groups=128", "704", "mlp.down"]),
        ({"recipe": [RecipeRule(match="*.proj", keep=0.5)], "groups": 8}, 3, ["qsparse.groups=8"]),
        ({"keep": 0.5, "mode": "block", "block_m": 48}, 1, ["qsparse.block_m=48", "256", "attention.qkv"]),
        ({"rescale": "l2"}, 1, ["qsparse.rescale=l2", "nothing is sparse"]),
        ({"keep": 0.5, "mode": "block"}, 4, ["qsparse.block_m=32", "704/4", "mlp.down"]),
        ({"keep": 0.5, "mode": "block", "block_n": 8}, 1, ["qsparse.block_n=8", "16 of 32", "qsparse.keep=0.25"]),
        ({"keep": 0.5, "block_n": 16}, 1, ["qsparse.block_n=16", "mode 'groups'", "qsparse.mode=block"]),
    ],
)
def test_misfits_are_told_with_field_and_numbers(fields, tensor_parallel, words):
    found = "\n".join(_problems(tensor_parallel, **fields))
    for word in words:
        assert word in found


def test_a_shared_expert_is_matched_by_recipes_where_there_is_one():
    recipe = [RecipeRule(match="*.mlp.shared_down", keep=0.5)]
    assert "matches no projection" in _problems(recipe=recipe)[0]
    widths = {**WIDTHS, "mlp.shared_gate_up": 256, "mlp.shared_down": 96}
    assert not problems(QSparseConfig(recipe=recipe), BitNetConfig(), widths, 4, 1)
    settings = resolve(0, 4, "mlp.shared_down", 96, QSparseConfig(recipe=recipe), BitNetConfig(subln=True))
    assert (settings.k(96), settings.groups, settings.subln) == (6, 8, True)


def test_a_misfit_is_told_once_per_projection():
    found = _problems(4, keep=0.5, mode="block", block_m=128)
    assert len(found) == 2 and "attention.proj" in found[0] and "mlp.down" in found[1]
