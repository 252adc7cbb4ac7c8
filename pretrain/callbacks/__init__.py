"""What a run does besides taking steps, one file a concern; listed in the order in which the trainer calls them:

`ownership` keeps the lease, `signals` decides whether this step is the last, `numbers` and `spikes` look at loss and gradient,
`validation` measures, `metrics` logs, `checkpointing` saves. `batches` is how a suspicious batch is kept.
"""
