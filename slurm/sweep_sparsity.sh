#!/usr/bin/env bash
# The same run at several degrees of sparsity, an element of the array for each: sbatch slurm/sweep_sparsity.sh [--section.field value ...]
# Degrees: QSPARSE_KEEPS, fractions of the inputs kept, 1 is dense. Compare them afterwards with compare.sh; see slurm/README.md.
#SBATCH --job-name=sweep_sparsity
#SBATCH --array=0-4
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out

# Slurm runs a copy of this file in a folder of its own.
JOB_SCRIPT=$0
[ -e "$(dirname "$JOB_SCRIPT")/lib.sh" ] || JOB_SCRIPT=$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s/\.sh .*/.sh/;p;q}')
# Each element is a run of its own.
export QSPARSE_RUN_PER_ELEMENT=1
source "$(dirname "$JOB_SCRIPT")/lib.sh"

read -ra keeps <<<"${QSPARSE_KEEPS:-1 0.7 0.5 0.4 0.3}"
index=${SLURM_ARRAY_TASK_ID:-0}
keep=${keeps[index]:-}
[ -n "$keep" ] || die "element $index of the array has no degree of sparsity: QSPARSE_KEEPS holds ${#keeps[@]}; submit with --array=0-$((${#keeps[@]} - 1))"
sweep=${QSPARSE_SWEEP:-sweep}
name=${sweep}_keep_$keep
# All in one experiment, and with one tag that MLflow groups by.
pretrain "$name" 300m_qsparse.yaml --qsparse.keep "$keep" --tracking.run_name "$name" --output_dir "${QSPARSE_RUNS:-runs}/$name" \
  --tracking.experiment "$sweep" --tracking.tags.group "$sweep" "$@"
