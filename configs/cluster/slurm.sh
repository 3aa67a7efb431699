#!/bin/bash
# Train on two nodes of four GPUs with Slurm: sbatch configs/cluster/slurm.sh --config config.yaml --output_dir /shared/out
# One torchrun per node starts one process per GPU; they meet at the first node. The script's arguments go to train_qlora.py.
# All nodes must see the virtual environment, this folder and the output folder.
#SBATCH --job-name=qlora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
# Five minutes before the end, the run saves after its optimizer step; --resume continues it in the next job.
#SBATCH --signal=TERM@300
set -euo pipefail
source .venv/bin/activate
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" \
  --rdzv_backend=c10d --rdzv_endpoint="$first:29500" --rdzv_id="$SLURM_JOB_ID" train_qlora.py "$@"
