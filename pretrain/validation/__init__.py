"""What `pretrain.validate` checks, one file for each kind of problem. Nothing here imports torch."""
