"""What differs between ranks is named once for each host: with the ranks, both values, and what to do."""

import yaml

from bigtrain.config import RunConfig, shareable, to_yaml
from bigtrain.distributed.consistency import CONFIG, DEVICE, SIZE, differences_among, in_common
from bigtrain.distributed.rendezvous import Member, named

CONFIGURATION = {
    "name": "small",
    "model": {"from_pretrained": "somewhere"},
    "stages": [
        {
            "name": "pretrain",
            "task": "pretrain",
            "data": [{"source": "stdlib"}],
            "sequence_length": 64,
            "global_batch_size": 5,
            "steps": 6,
            "optimizer": {"lr": 1e-3},
        }
    ],
}


def members(*changes):
    """Rank 0 on node-a, and on node-b a rank for each of the changes to its metadata."""
    metadata = in_common(shareable(RunConfig.model_validate(CONFIGURATION))) | {
        SIZE: "8",
        DEVICE: "cuda",
        "torch": "2.13.0",
    }
    return [
        Member(0, "node-a", metadata),
        *(Member(n, "node-b", metadata | change) for n, change in enumerate(changes, 1)),
    ]


def config_with(**changes):
    return {
        CONFIG: to_yaml(
            RunConfig.model_validate(yaml.safe_load(to_yaml(RunConfig.model_validate(CONFIGURATION))) | changes)
        )
    }


def test_the_same_on_all_ranks_is_nothing_to_tell():
    assert differences_among(members({}, {})) == []


def test_another_version_is_named_with_both_values():
    assert differences_among(members({}, {}, {"torch": "2.12.0"})) == [
        "rank 3 on node-b: torch 2.12.0, rank 0 on node-a has 2.13.0; install the same on all hosts."
    ]


def test_ranks_with_the_same_difference_share_a_line():
    old = {"torch": "2.12.0", "the source of bigtrain": "0123"}
    lines = differences_among(members({}, *[old] * 7))
    assert len(lines) == 2
    assert lines[0].startswith("ranks 2, 3, 4, 5, 6 and 2 more on node-b: torch 2.12.0")
    assert lines[1].startswith("ranks 2, 3, 4, 5, 6 and 2 more on node-b: the source of bigtrain 0123, rank 0")


def test_of_the_runs_file_the_keys_that_differ_are_named():
    stage = {**CONFIGURATION["stages"][0], "optimizer": {"lr": 2e-3}}
    remedy = "start all ranks with the same file and overrides."
    assert differences_among(members(config_with(seed=1, stages=[stage]))) == [
        f"rank 1 on node-b: seed: 1, rank 0 on node-a has 0; {remedy}",
        f"rank 1 on node-b: stages.pretrain.optimizer.lr: 0.002, rank 0 on node-a has 0.001; {remedy}",
    ]
    more = [CONFIGURATION["stages"][0], {**CONFIGURATION["stages"][0], "name": "more"}]
    assert "stages.more.steps: 6, rank 0 on node-a has no such key" in "\n".join(
        differences_among(members(config_with(stages=more)))
    )


def test_devices_and_world_sizes_have_remedies_of_their_own():
    lines = differences_among(members({DEVICE: "cpu"}, {SIZE: "4"}))
    assert lines[0].startswith(
        "rank 1 on node-b: device cpu, rank 0 on node-a has cuda; look at that host's GPU driver"
    )
    assert lines[1].startswith("rank 2 on node-b: WORLD_SIZE 4, rank 0 on node-a has 8; tell all hosts of the same")


def test_ranks_in_words():
    assert named([3]) == "rank 3"
    assert named([0, 1]) == "ranks 0, 1"


def test_ranks_of_one_host_that_would_share_a_gpu_are_named():
    metadata = members()[0].metadata
    gpus = [("node-a", "GPU-1"), ("node-a", "GPU-2"), ("node-b", "GPU-1"), ("node-a", "GPU-1"), ("node-b", None)]
    found = differences_among([Member(rank, host, metadata, gpu) for rank, (host, gpu) in enumerate(gpus)])
    assert found == [
        "ranks 0, 3 on node-a have one GPU together (GPU-1). Start as many processes as there are GPUs, let the "
        "launcher give each its own, or set parallel.device: cpu."
    ]
