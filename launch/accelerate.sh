#!/usr/bin/env bash
# Trains llama-8b-fsdp with accelerate: 64 processes on 8 nodes, 8 on each, as --processes says.
# Run it on each of the 8 nodes, in a folder that all of them see.
# Made by: bigtrain launch configs/llama-8b-fsdp-64gpu.yaml --with accelerate --nodes 8 --processes 8 --head node0 --print
#
#   --multi_gpu                several processes; on CPUs too, where --cpu would start a single one
#   --num_processes 64         processes on all nodes together
#   --num_machines 8           nodes
#   --mixed_precision no       bigtrain decides it: `precision` in the run's file
#   --dynamo_backend no        the same for compiling
#   --rdzv_backend c10d        the nodes find each other through a store on the head
#   --machine_rank 0           accelerate asks for a number, and c10d does not look at it
#   --main_process_ip node0    the head: one of the nodes
#   --main_process_port 29400  a free port there
#
# If the nodes have several networks, name the one to use:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

set -euo pipefail

exec accelerate launch \
  --multi_gpu \
  --num_processes 64 \
  --num_machines 8 \
  --mixed_precision no \
  --dynamo_backend no \
  --rdzv_backend c10d \
  --machine_rank 0 \
  --main_process_ip node0 \
  --main_process_port 29400 \
  --module bigtrain run configs/llama-8b-fsdp-64gpu.yaml
