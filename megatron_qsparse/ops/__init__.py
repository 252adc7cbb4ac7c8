"""The mathematics in plain torch: the reference for every fast path.

`counts` says how many survive, `topk` which, `sparsify` applies the mask with a straight-through gradient, `quantize` makes
the integer codes, `product` multiplies them, `norms` holds the two statistics of a whole token. No function here
communicates: whoever holds only a shard of the feature dimension passes a `reduce` callable.
"""
