"""Which layouts of a run fit a cluster, and how long their steps may take: `python -m pretrain.plan --suggest`."""
