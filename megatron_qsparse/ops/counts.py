"""How many entries survive, and how many may be summed: free of torch, so that planning tools can use it."""

from fractions import Fraction

MAX_INPUTS = (1 << 24) // 127
"""132,104: above it a sum of 127s is no longer exact in fp32."""


def keep_count(keep: float | Fraction, width: int) -> int:
    """K of a width: `max(1, floor(keep * width + 1/2))` in exact arithmetic.

    keep: kept fraction in (0, 1], read as a decimal (0.7 is 7/10, not the nearest binary float). width: number of features
    of one group, one block or one whole token. Raises ValueError outside these ranges.
    """
    fraction = Fraction(str(keep))
    if not 0 < fraction <= 1:
        raise ValueError(f"keep is the kept fraction and must lie in (0, 1], not {keep}")
    if width < 1:
        raise ValueError(f"a width of {width} features has nothing to keep")
    return max(1, int(fraction * width + Fraction(1, 2)))
