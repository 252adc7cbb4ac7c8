#!/usr/bin/env bash
# Looks at nodes without training: sbatch --nodes=16 slurm/preflight.sh [flags of `python -m pretrain.preflight node`]; see slurm/README.md.
#SBATCH --job-name=preflight
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=00:15:00
#SBATCH --output=%x-%j.out

# Slurm runs a copy of this file in a folder of its own.
JOB_SCRIPT=$0
[ -e "$(dirname "$JOB_SCRIPT")/lib.sh" ] || JOB_SCRIPT=$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s/\.sh .*/.sh/;p;q}')
source "$(dirname "$JOB_SCRIPT")/lib.sh"

preflight_job "$@"
