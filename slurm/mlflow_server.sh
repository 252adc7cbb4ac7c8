#!/usr/bin/env bash
# An MLflow server for the runs of a cluster that has none: sbatch slurm/mlflow_server.sh; see slurm/README.md.
# It writes its address to mlflow.uri in QSPARSE_MLFLOW, the folder that holds its database and artifacts. Whoever reaches the node reaches
# the server: it asks for no password.
#SBATCH --job-name=mlflow_server
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=8G
#SBATCH --time=7-00:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# Slurm runs a copy of this file in a folder of its own.
JOB_SCRIPT=$0
[ -e "$(dirname "$JOB_SCRIPT")/lib.sh" ] || JOB_SCRIPT=$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s/\.sh .*/.sh/;p;q}')
source "$(dirname "$JOB_SCRIPT")/lib.sh"

mlflow_server "$@"
