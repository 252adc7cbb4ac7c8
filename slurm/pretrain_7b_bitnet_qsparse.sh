#!/usr/bin/env bash
# 7B, BitNet b1.58 with Q-Sparse inputs. sbatch slurm/pretrain_7b_bitnet_qsparse.sh [--section.field value ...]; see slurm/README.md.
#SBATCH --job-name=7b_bitnet_qsparse
#SBATCH --nodes=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# Slurm runs a copy of this file in a folder of its own.
JOB_SCRIPT=$0
[ -e "$(dirname "$JOB_SCRIPT")/lib.sh" ] || JOB_SCRIPT=$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s/\.sh .*/.sh/;p;q}')
source "$(dirname "$JOB_SCRIPT")/lib.sh"

pretrain 7b_bitnet_qsparse 7b_bitnet_qsparse.yaml "$@"
