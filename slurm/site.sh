# shellcheck shell=bash
# Settings that differ between clusters. A plain CPU cluster needs none of them.
#
# Edit it (or a copy of it, anywhere), then
#
#     source slurm/site.sh
#
# in the shell that you submit from: sbatch reads the SBATCH_... variables when a job is submitted.
# The templates read the file again when the job starts, for all other settings.

MAE_SCALE_SITE=$(realpath "${BASH_SOURCE[0]}")
export MAE_SCALE_SITE

# --- for sbatch; options on its command line win -----------------------------------------------

# export SBATCH_ACCOUNT=project
# export SBATCH_PARTITION=gpu
# export SBATCH_TIMELIMIT=24:00:00

# GPUs, in the style that your Slurm wants: one of these.
# export SBATCH_GPUS_PER_NODE=8
# export SBATCH_GRES=gpu:8
# export SBATCH_GRES=gpu:a100:8

# Whole nodes, with all their CPUs and memory ...
# export SBATCH_EXCLUSIVE=exclusive
# export SBATCH_MEM_PER_NODE=0
# ... or a share of each.
# export SBATCH_CPUS_PER_GPU=8
# export SBATCH_MEM_PER_GPU=60G

# --- for the job; a variable of the same name in your environment wins --------------------------

# Environment modules to load, separated by spaces, such as "python/3.11 cuda/12.4".
MAE_MODULES=${MAE_MODULES:-}

# Virtual environment. If empty: the .venv of this checkout, or else the first python3 in PATH.
MAE_VENV=${MAE_VENV:-}

# Container instead of an environment: "pyxis:IMAGE" or "apptainer:FILE.sif", with the folders that
# it must see, such as "/data,/runs:/runs".
MAE_CONTAINER=${MAE_CONTAINER:-}
MAE_MOUNTS=${MAE_MOUNTS:-}

# How tasks are bound to CPUs (srun --cpu-bind).
MAE_CPU_BIND=${MAE_CPU_BIND:-cores}

# Network interface of the fast network for NCCL and gloo, such as ib0 or "hsn". If empty, these
# choose one.
MAE_INTERFACE=${MAE_INTERFACE:-}
