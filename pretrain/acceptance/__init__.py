"""Does this project compute on a cluster what it computes elsewhere? slurm/acceptance.sh runs these cases inside of one job.

Layouts: a reference on one process trains a few steps; each layout takes its checkpoint before the last step, takes that step, and must
have the same loss, gradient norm, gradients and weights. Resharding: one run goes on from layout to layout. A kill: a run whose first rank
is killed and that is started again has the losses and weights of one that was not, bit for bit.
"""
