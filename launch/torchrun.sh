#!/usr/bin/env bash
# Trains llama-8b-fsdp with torchrun: 64 processes on 8 nodes, 8 on each, as --processes says.
# Run it on each of the 8 nodes, in a folder that all of them see.
# Made by: bigtrain launch configs/llama-8b-fsdp-64gpu.yaml --with torchrun --nodes 8 --processes 8 --head node0 --print
#
#   --nnodes 8                   machines that take part; the first wait ten minutes for the others
#   --nproc-per-node 8           processes on each of them
#   --rdzv-backend c10d          they find each other through a store on the head
#   --rdzv-id llama-8b-fsdp      the same on all of them, another for each run on the same head
#   --rdzv-endpoint node0:29400  the head: one of them, and a free port there
#   --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
#                                passed on to the processes, which SIGUSR1 would orphan else
#   --shutdown-timeout 180       seconds to write a checkpoint in after a signal
#
# If the nodes have several networks, name the one to use:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

set -euo pipefail

exec torchrun \
  --nnodes 8 \
  --nproc-per-node 8 \
  --rdzv-backend c10d \
  --rdzv-id llama-8b-fsdp \
  --rdzv-endpoint node0:29400 \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  --shutdown-timeout 180 \
  -m bigtrain run configs/llama-8b-fsdp-64gpu.yaml
