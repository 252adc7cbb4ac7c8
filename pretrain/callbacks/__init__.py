"""What a run does besides taking steps, one file a concern; listed in the order in which the trainer calls them:

`signals` decides whether this step is the last, `validation` measures, `metrics` logs, `checkpointing` saves.
"""
