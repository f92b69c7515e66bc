"""Who started a process, and as which rank: the environments are those of the launchers' documentation."""

import pytest

from bigtrain.errors import ConfigError
from bigtrain.launching.launchers import Launcher, first_host, launcher

BATCH_SCRIPT = {  # what sbatch sets in its script, on the first of two nodes
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_GTIDS": "0",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}
TASK = {  # what srun adds in the third task on the second node
    **BATCH_SCRIPT,
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_GTIDS": "4,5,6,7",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def test_a_task_of_srun_is_a_rank():
    found = launcher(TASK)
    assert found is not None
    assert found.why == "as srun says"
    port = found.variables["MASTER_PORT"]
    assert found.variables == {
        "RANK": "6",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "2",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "node01",
        "MASTER_PORT": port,
    }
    assert 10_000 <= int(port) < 30_000
    assert launcher(TASK | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).variables["MASTER_PORT"] == port
    for other in ({"SLURM_JOB_ID": "4712"}, {"SLURM_STEP_ID": "2"}):
        assert launcher(TASK | other).variables["MASTER_PORT"] != port


def test_where_the_tasks_meet_can_be_given():
    given = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"}
    assert given.items() <= launcher(TASK | given).variables.items()


def test_without_the_ranks_of_a_host_their_number_is_not_guessed():
    variables = launcher({name: value for name, value in TASK.items() if name != "SLURM_GTIDS"}).variables
    assert "LOCAL_WORLD_SIZE" not in variables


@pytest.mark.parametrize(
    ("gpus", "local_rank"),
    [
        ({"SLURM_GPUS_PER_TASK": "1"}, "0"),
        ({"SLURM_GPUS_PER_TASK": "a100:1", "CUDA_VISIBLE_DEVICES": "0"}, "0"),
        ({"SLURM_GPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}, "2"),  # unbound
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}, "2"),
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "4"}, "0"),  # --gpu-bind=single:1
    ],
)
def test_a_task_that_sees_only_its_own_gpu_takes_the_first(gpus, local_rank):
    assert launcher(TASK | gpus).variables["LOCAL_RANK"] == local_rank


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,gpu3", "node1"),
        ("node[01-04,07],gpu3", "node01"),
        ("node[7,9-12]", "node7"),
        ("rack[2-3]n[00-31]-ib,x", "rack2n00-ib"),
        ("gpu-a.cluster.org,gpu-b.cluster.org", "gpu-a.cluster.org"),
    ],
)
def test_the_first_host_of_a_short_form(nodelist, host):
    assert first_host(nodelist) == host


@pytest.mark.parametrize(
    "environment",
    [
        {},
        BATCH_SCRIPT,  # and the shell of salloc
        TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # an interactive step
    ],
)
def test_what_has_no_peers_is_no_rank(environment):
    assert launcher(environment) is None


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        (TORCHRUN, "torchrun"),
        (TORCHRUN | TASK, "torchrun"),
        (TORCHRUN | {"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch"),
        ({**TORCHRUN, "CROSS_SIZE": "2", "LOCAL_SIZE": "2"} | {"TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1", "CROSS_SIZE": "1"}, "deepspeed"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE"),
        (TORCHRUN | {"BIGTRAIN_FAILURE_FILE": "somewhere"}, "bigtrain"),
    ],
)
def test_a_rank_that_is_given_wins(environment, name):
    assert launcher(environment) == Launcher(f"as {name} says", {})


def test_half_an_environment_is_told():
    with pytest.raises(ConfigError, match="RANK=1, but no WORLD_SIZE, MASTER_PORT"):
        launcher({"RANK": "1", "MASTER_ADDR": "a"})


def test_accelerate_with_one_process_sets_no_rank():
    found = launcher({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"})
    assert found.why == "as accelerate launch has started one"
    assert found.variables == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def test_mpirun_wins_over_the_step_of_srun_that_it_was_started_by():
    found = launcher(TASK | OPEN_MPI)
    assert found.why == "as mpirun says"
    assert found.variables["RANK"] == "1"
    assert found.variables["MASTER_ADDR"] == "127.0.0.1"


def test_mpirun_on_several_hosts_has_to_say_where_rank_0_is():
    several = OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}
    with pytest.raises(ConfigError, match="no MASTER_ADDR"):
        launcher(several)
    assert launcher(several | {"MASTER_ADDR": "node-a"}).variables["MASTER_ADDR"] == "node-a"
