"""The invariance suite's result as a table."""

from pathlib import Path

from tests.parallel.comparison import Comparison
from tests.parallel.table import Pair


class InvarianceTable:
    """Collects rows while the tests run."""

    def __init__(self):
        self.pairs: list[str] = []
        self.faults: list[str] = []
        self.free_runs: list[str] = []

    def pair(self, pair: Pair, comparisons: list[Comparison]) -> None:
        """The largest differences over the compared steps; without those of batches in which a near-tie flipped."""
        strict = [comparison for comparison in comparisons if comparison.flips == 0]
        largest = [
            max((value for value in values), default=float("nan"))
            for values in (
                [step.loss for step in strict], [step.norm for step in strict], [step.gradient[0] for step in strict],
                [step.weight[0] for step in strict], [step.inputs[0] for step in comparisons],
            )
        ]  # fmt: skip
        flips = f"{sum(step.flips for step in comparisons)} of {sum(step.entries for step in comparisons)}"
        problems = sum(len(step.problems()) for step in comparisons)
        cells = [pair.variant, pair.layout, pair.precision, str(len(strict)), *(f"{value:.1e}" for value in largest), flips]
        self.pairs.append(_row([*cells, f"{problems} PROBLEMS" if problems else "ok"]))

    def fault(self, mistake: str, pair: Pair, problems: list[str]) -> None:
        self.faults.append(_row([mistake, str(pair), str(len(problems)), problems[0] if problems else "NOT FOUND"]))

    def free(self, pair: Pair, loss: float) -> None:
        self.free_runs.append(_row([pair.variant, pair.layout, f"{loss:.1e}"]))

    def write(self, path: Path) -> None:
        """Markdown."""
        sections = [
            ("Teacher-forced steps: largest differences from one process",
             ["variant", "layout", "precision", "steps", "loss", "norm", "gradient", "weight", "inputs", "flips", ""], self.pairs),
            ("Free-running steps: largest difference of a loss", ["variant", "layout", "loss"], self.free_runs),
            ("Mistakes slipped in", ["mistake", "pair", "problems", "first"], self.faults),
        ]  # fmt: skip
        parts = [f"## {title}\n\n{_row(head)}\n{_row(['---'] * len(head))}\n" + "\n".join(rows) for title, head, rows in sections]
        path.write_text("\n\n".join(parts) + "\n")


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
