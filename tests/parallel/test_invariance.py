"""One model, whatever the layout: from the reference's checkpoints every layout takes the reference's steps.

For each pair of a variant and a layout in `table`: load what one process saved, take one step with the real engine, compare
loss, gradient norm, every gradient, every weight after the step, Adam's count, every mask entry and every code. See
`teacher` for how, `comparison` for the tolerances, CONTRIBUTING.md for how to add a row.
"""

import pytest
import torch

from tests.parallel.comparison import Comparison, Trace, compare
from tests.parallel.faults import against_reference_with
from tests.parallel.helpers import layout
from tests.parallel.recording import Choices
from tests.parallel.table import FAULTS, FREE_LOSS, FREE_STEPS, LAYERS, Pair, all_free_pairs, all_pairs, free_pairs, pairs
from tests.parallel.teacher import AFTER, BATCHES, traced_step, write_reference
from tests.parallel.training import Case, History, make_engine, train_all

QUICK = pairs()


def _marked(every: list[Pair], quick: list[Pair]) -> list:
    return [pytest.param(pair, id=str(pair), marks=[] if pair in quick else pytest.mark.matrix) for pair in every]


@pytest.fixture(scope="module")
def reference(pool, tmp_path_factory):
    """Folder of the reference's checkpoints, and of its traces with a batch; made when they are first asked for."""
    root, made = tmp_path_factory.mktemp("references"), set()

    def folder(pair: Pair, batch: int):
        case = pair.reference()
        path = root / f"{pair.variant}-{pair.precision}-{case.micro_batch}"
        if (case, batch) not in made:
            following = any(other.following for other in QUICK if other.reference() == case)
            pool.run(write_reference, 1, path, case, batch, following)
            made.add((case, batch))
        return path

    return folder


def _compared(pool, reference, pair: Pair, mistake: str | None = None) -> list[Comparison]:
    """The steps from all checkpoints, each with one batch after the other up to the first one without a flip."""
    # A mistake is found at the first checkpoint, and may leave an engine that cannot go on.
    found, pending = [], AFTER if mistake is None else AFTER[:1]
    for batch in range(BATCHES):
        arguments = (mistake, reference(pair, batch), pair.case(), pending, batch, pair.following)
        steps = pool.run(against_reference_with, pair.ranks, *arguments)[0]
        found += [step for after in steps for step in after]
        pending = [updates for updates, after in zip(pending, steps, strict=True) if any(step.flips for step in after)]
        if not pending:
            return found
    found[-1].unexplained.append(f"none of {BATCHES} batches is without a flip")
    return found


def _problems(comparisons: list[Comparison]) -> list[str]:
    return [problem for comparison in comparisons for problem in comparison.problems()]


@pytest.mark.parametrize("pair", _marked(all_pairs(), QUICK))
def test_a_layout_takes_the_steps_of_one_process(pool, reference, invariance_table, pair):
    comparisons = _compared(pool, reference, pair)
    invariance_table.pair(pair, comparisons)
    assert not _problems(comparisons), f"{pair}\n" + "\n".join(_problems(comparisons))


@pytest.mark.parametrize(("mistake", "pair", "words"), FAULTS, ids=[f"{mistake}-{pair}" for mistake, pair, _ in FAULTS])
def test_the_same_comparison_finds(pool, reference, invariance_table, mistake, pair, words):
    assert pair in QUICK, "without the mistake this pair must be seen to pass"
    problems = _problems(_compared(pool, reference, pair, mistake))
    invariance_table.fault(mistake, pair, problems)
    assert any(words in problem for problem in problems), "\n".join(problems)


def test_one_entry_more_or_less_is_no_near_tie():
    """Two of four entries are kept in each of two slices; the second and third of the first slice are equal."""
    inputs = torch.tensor([[4.0, 2.0, 2.0, 1.0, 4.0, 3.0, 2.0, 1.0]]).view(1, 1, 1, 8)
    kept = torch.tensor([1, 1, 0, 0, 1, 1, 0, 0]).bool().view_as(inputs)
    for flips, explained in (([1, 2], True), ([2], False), ([1], False), ([5, 6], False), ([1, 6], False)):
        chosen = kept.clone()
        chosen[..., flips] ^= True
        traces = [Trace(0.0, 1.0, {"w": torch.ones(1)}, {"w": torch.ones(1)}, 1, {}, {("mask", "p"): Choices(inputs, each, None, 2)})
                  for each in (kept, chosen)]  # fmt: skip
        found = compare("step", *traces)
        assert found.flips == len(flips) and bool(found.unexplained) != explained


def _train(pool, ranks: int, case: Case) -> History:
    return pool.run(train_all, ranks, [case])[0][case]


@pytest.fixture(scope="module")
def free_reference(pool):
    """Eight steps of one process."""
    made: dict[str, History] = {}

    def history(variant: str) -> History:
        if variant not in made:
            made[variant] = _train(pool, 1, Case(variant, layers=LAYERS, steps=FREE_STEPS))
        return made[variant]

    return history


@pytest.mark.parametrize("pair", _marked(all_free_pairs(), free_pairs()))
def test_eight_steps_on_its_own_end_where_one_process_ends(pool, free_reference, invariance_table, pair):
    """Without int8 and ternary rounding, whose near-ties would flip sooner or later."""
    expected = free_reference(pair.variant)
    found = _train(pool, pair.ranks, pair.case(steps=FREE_STEPS))
    losses = (torch.tensor(found.losses) - torch.tensor(expected.losses)).abs()
    invariance_table.free(pair, losses.max().item())
    assert losses.max() <= FREE_LOSS, f"{pair}: losses differ by {[f'{loss:.1e}' for loss in losses]}"
    assert len(set(expected.losses)) == FREE_STEPS


def _two_micro_batches(rank: int, case: Case) -> dict:
    """The first step of a batch of two samples without clipping, which would divide by a norm summed in another order."""
    outputs: dict[str, list[torch.Tensor]] = {}
    with layout() as parallel:
        engine = make_engine(case, parallel, clip=0.0)
        for module in engine.model.modules():
            if hasattr(module, "settings") and not module.input_is_sharded:
                seen = outputs.setdefault(module.settings.name, [])
                module.register_forward_hook(lambda module, inputs, result, seen=seen: seen.append(result[0].detach().clone()))
        trace = traced_step(engine, seed=0, samples=2)
    return {"trace": trace, "outputs": outputs}


@pytest.mark.parametrize("variant", ["bitnet", "bitnet_groups_subln", "one_kv_head"])
def test_data_parallel_ranks_keep_every_bit_of_bitnet(pool, variant):
    """Each rank has one of the two micro-batches; tests/layers/test_linears.py holds the same for tensor parallelism."""
    case = Case(variant, layers=LAYERS)
    [one], two = pool.run(_two_micro_batches, 1, case), pool.run(_two_micro_batches, 2, case)
    assert one["outputs"]
    for name, samples in one["outputs"].items():
        assert all(torch.equal(sample, rank["outputs"][name][0]) for sample, rank in zip(samples, two, strict=True)), name
    for what in ("gradients", "alphas"):
        expected, found = getattr(one["trace"], what), getattr(two[0]["trace"], what)
        assert expected.keys() == found.keys() and not two[0]["trace"].differing
        assert all(torch.equal(found[name], tensor) and tensor.any() for name, tensor in expected.items()), what
