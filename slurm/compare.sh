#!/usr/bin/env bash
# A report of finished runs: sbatch --dependency=afterok:JOB[:JOB...] slurm/compare.sh --output report RUN_DIR ...
# Arguments are those of `python -m pretrain.compare`; see slurm/README.md.
#SBATCH --job-name=compare
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out

# Slurm runs a copy of this file in a folder of its own.
JOB_SCRIPT=$0
[ -e "$(dirname "$JOB_SCRIPT")/lib.sh" ] || JOB_SCRIPT=$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s/\.sh .*/.sh/;p;q}')
source "$(dirname "$JOB_SCRIPT")/lib.sh"

tool python -m pretrain.compare "$@"
