#!/bin/bash
# A recipe on two nodes with eight GPUs each: sbatch examples/slurm.sh recipes/llama-7b-convex.yaml
# Submit again with the same recipe to go on where it was stopped.
#SBATCH --job-name=convexlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@600

set -euo pipefail

RECIPE=${1:?which recipe}
ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Ports differ by job, so that two jobs on a node do not meet.
PORT=$((20000 + SLURM_JOB_ID % 20000))
export RECIPE ADDRESS PORT

# One `convexlm` a node; it starts the node's processes. Ten minutes before the end SLURM sends SIGTERM: the training saves and
# stops. The run folder must be on a file system that all nodes see. `convexlm train` takes the same options.
srun --kill-on-bad-exit=1 bash -c 'exec convexlm run "$RECIPE" \
  --accelerate_config fsdp2 \
  --num_machines "$SLURM_NNODES" \
  --num_processes $((8 * SLURM_NNODES)) \
  --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$ADDRESS" \
  --main_process_port "$PORT"'
