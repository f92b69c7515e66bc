"""Ranks that cannot make one run together say why, once, and none of them stays."""

import platform

import pytest

from bigtrain.launching.spawn import free_port
from tests.forked import living, run_commands
from tests.support import small_config

HOST = platform.node()


def start(ranks, config, *, size=2, seconds=60):
    """Start ranks as a launcher does: each {"rank": ..., "port": ..., "cwd": ..., "overrides": ...}; returns for each
    (exit code, what it said), and the processes that are left."""
    commands = []
    for each in ranks:
        variables = {
            "RANK": str(each["rank"]),
            "LOCAL_RANK": str(each["rank"]),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(each["port"]),
            "BIGTRAIN_JOIN_SECONDS": str(seconds),
        }
        arguments = ["run", str(config), *each.get("overrides", ())]
        commands.append((arguments, each.get("cwd", config.parent), variables))
    done = run_commands(commands, timeout=120)
    return [(process.returncode, process.stderr) for process in done], living(config.parent)


def test_ranks_with_different_files_are_told_which_keys_differ(tmp_path):
    config, port = small_config(tmp_path), free_port()
    other = ["stages.pretrain.optimizer.lr=1e-2", "parallel.engine=fsdp"]
    results, left = start([{"rank": 0, "port": port}, {"rank": 1, "port": port, "overrides": other}], config)
    assert [code for code, _ in results] == [2, 2]
    assert results[0][1].splitlines() == [
        f"rank 1 on {HOST}: {key}, rank 0 on {HOST} has {ours}; start all ranks with the same file and overrides."
        for key, ours in (("parallel.engine: fsdp", "ddp"), ("stages.pretrain.optimizer.lr: 0.01", "0.003"))
    ]
    assert results[1][1] == ""  # rank 0 has told it
    assert left == []
    assert not (tmp_path / "runs").exists()


def test_ranks_that_do_not_share_the_runs_folder_are_named(tmp_path):
    config, port = small_config(tmp_path, output="runs"), free_port()
    folders = [tmp_path / "disk-of-0", tmp_path / "disk-of-1"]
    for folder in folders:
        folder.mkdir()
    results, left = start([{"rank": n, "port": port, "cwd": folder} for n, folder in enumerate(folders)], config)
    assert [code for code, _ in results] == [2, 2]
    lines = results[0][1].splitlines()
    assert lines[:2] == [
        f"What rank 0 on {HOST} has written to {folders[0]}/runs/small is not seen by",
        f"  rank 1 on {HOST}: {folders[1]}/runs/small",
    ]
    assert len(lines) == 3
    assert "output=FOLDER, or run on one host" in lines[2]
    assert results[1][1] == ""
    assert left == []


def test_what_rank_0_refuses_ends_all_ranks_and_is_told_once(tmp_path):
    config, port = small_config(tmp_path), free_port()
    (tmp_path / "functions.jsonl").write_text("")
    results, left = start([{"rank": n, "port": port} for n in (0, 1)], config)
    assert [code for code, _ in results] == [2, 2]
    assert "functions.jsonl" in results[0][1]
    assert "holds no documents" in results[0][1]
    assert "Traceback" not in results[0][1]
    assert results[1][1] == ""
    assert left == []
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Rank 0, which waits for others at one port, and rank 1, which looks for rank 0 at another."""
    config = small_config(tmp_path_factory.mktemp("alone"))
    ranks = [{"rank": n, "port": free_port()} for n in (0, 1)]
    return ranks, *start(ranks, config, size=3, seconds=2)


def test_a_rank_that_cannot_reach_rank_0_names_the_address(alone):
    ranks, results, left = alone
    code, text = results[1]
    assert code == 1
    assert text.startswith(f"rank 1 on {HOST} cannot reach rank 0 at 127.0.0.1:{ranks[1]['port']}: Connection refused.")
    assert "MASTER_ADDR" in text
    assert "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in text
    assert "Traceback" not in text
    assert left == []


def test_ranks_that_do_not_come_are_named(alone):
    ranks, results, _ = alone
    code, text = results[0]
    assert code == 1
    address = f"rank 0 on {HOST}, 127.0.0.1:{ranks[0]['port']}"
    assert text.startswith(f"ranks 1, 2 of 3 did not come to {address}, within 2 s.")
    assert "Traceback" not in text
