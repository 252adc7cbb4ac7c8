"""What a Slurm job does around the training processes: decide whether and how to start, keep account, decide how to go on.

The scripts in slurm/ call `python -m pretrain.job`. Nothing here imports torch.
"""
