#!/usr/bin/env bash
# One corpus, tokenized by many nodes into one folder of shards:
#   sbatch slurm/tokenize.sh --input corpus/*.jsonl.zst --tokenizer tokenizer/ --output shards/
# Flags are those of `python -m data_tools tokenize`. The bytes depend neither on the number of elements nor on which of them run when.
#SBATCH --job-name=tokenize
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --mem-per-cpu=2G
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out

# Slurm runs a copy of this file in a folder of its own.
JOB_SCRIPT=$0
[ -e "$(dirname "$JOB_SCRIPT")/lib.sh" ] || JOB_SCRIPT=$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s/\.sh .*/.sh/;p;q}')
source "$(dirname "$JOB_SCRIPT")/lib.sh"

tokenize_corpus "$@"
