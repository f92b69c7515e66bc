#!/usr/bin/env bash
# Trains llama-8b-fsdp with deepspeed: 64 processes on 8 nodes, 8 on each, as --processes says.
# Run it on one of the nodes, in a folder that all of them see under the same name.
# Made by: bigtrain launch configs/llama-8b-fsdp-64gpu.yaml --with deepspeed --nodes 8 --processes 8 --hostfile launch/hostfile --print
#
#   --hostfile launch/hostfile  a line `NAME slots=GPUS` for each node that ssh reaches
#   --num_nodes 8               how many of them take part: the first ones of the file
#   --num_gpus 8                processes on each node, on GPUs 0, 1, ...
#
# If the nodes have several networks, name the one to use:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

set -euo pipefail

exec deepspeed \
  --hostfile launch/hostfile \
  --num_nodes 8 \
  --num_gpus 8 \
  --module bigtrain run configs/llama-8b-fsdp-64gpu.yaml
