#!/usr/bin/env bash
# Does this project work on your cluster? sbatch slurm/acceptance.sh; the report is for an issue; see slurm/README.md.
#SBATCH --job-name=acceptance
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=03:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.out

# Slurm runs a copy of this file in a folder of its own.
JOB_SCRIPT=$0
[ -e "$(dirname "$JOB_SCRIPT")/lib.sh" ] || JOB_SCRIPT=$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s/\.sh .*/.sh/;p;q}')
source "$(dirname "$JOB_SCRIPT")/lib.sh"

acceptance "$@"
