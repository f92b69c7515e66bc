"""Who started a process, and as which rank: the environments are those of the launchers' documentation."""

import os
import re

import pytest

from bigtrain.config.environment import DEFAULT_JOIN_SECONDS, join_seconds, threads
from bigtrain.errors import ConfigError
from bigtrain.launching.launchers import Launcher, adopt, first_host, launcher
from tests.support import bigtrain, small_config

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


MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
HAND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "4"}, "has WORLD_SIZE=4 but no RANK"),
        ({"WORLD_SIZE": "two"}, "has WORLD_SIZE=two but no RANK"),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "3"}, "`unset WORLD_SIZE LOCAL_RANK`"),
        ({"LOCAL_RANK": "0"}, "has LOCAL_RANK=0 but no RANK"),
        ({"LOCAL_WORLD_SIZE": "8", "MASTER_PORT": "x"}, "has LOCAL_WORLD_SIZE=8 but no RANK"),
        ({"RANK": "0"}, "has RANK=0, but no WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        (without(HAND, "MASTER_ADDR"), "has RANK=1, but no MASTER_ADDR"),
        (HAND | {"RANK": "one"}, "RANK=one in the environment is no whole number from 0 to 1."),
        (HAND | {"RANK": ""}, "RANK= in the environment is no whole number"),
        (HAND | {"RANK": "-1"}, "RANK=-1 in the environment"),
        (HAND | {"RANK": "2"}, "RANK=2 in the environment is no whole number from 0 to 1. WORLD_SIZE is 2"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1 in the environment is no whole number from 0 to 0"),
        (HAND | {"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment"),
        (HAND | {"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment is no whole number of at least 1"),
        (HAND | {"WORLD_SIZE": "\u0662"}, "WORLD_SIZE=\u0662 in the environment"),  # a digit of another script
        (HAND | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2 in the environment is no whole number from 0 to 1"),
        (HAND | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1 in the environment"),
        (HAND | {"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3 in the environment is no whole number from 1 to 2"),
        (HAND | {"MASTER_PORT": "tcp://10.0.0.1:80"}, "MASTER_PORT=tcp://10.0.0.1:80 in the environment"),
        (HAND | {"MASTER_PORT": "tcp://10.0.0.1:80"}, "`enableServiceLinks: false`"),
        (HAND | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536 in the environment is no whole number from 1 to 65535"),
        (HAND | {"MASTER_PORT": ""}, "MASTER_PORT= in the environment"),
        (HAND | {"MASTER_ADDR": "tcp://node0"}, "MASTER_ADDR=tcp://node0 in the environment is no name or address"),
        (HAND | {"MASTER_ADDR": "\x1b[2J"}, "MASTER_ADDR=?[2J in the environment"),
        (without(TASK, "SLURM_LOCALID"), "has SLURM_STEP_NUM_TASKS=8, which srun sets, but no SLURM_LOCALID"),
        (without(TASK, "SLURM_PROCID"), "but no SLURM_PROCID: start all processes with srun"),
        (without(TASK, "SLURM_JOB_ID", "SLURM_STEP_NODELIST"), "no SLURM_JOB_ID, SLURM_STEP_NODELIST"),
        (TASK | {"SLURM_PROCID": "8"}, "SLURM_PROCID=8 in the environment is no whole number from 0 to 7"),
        (TASK | {"SLURM_LOCALID": "x"}, "SLURM_LOCALID=x in the environment"),
        (TASK | {"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS=many in the environment"),
        (TASK | {"SLURM_JOB_ID": "a"}, "SLURM_JOB_ID=a in the environment"),
        (TASK | {"MASTER_PORT": "tcp://1:2"}, "MASTER_PORT=tcp://1:2 in the environment"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "has OMPI_COMM_WORLD_RANK=1, which mpirun sets, but no OMPI_COMM_WORLD_SIZE"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_RANK"), "but no OMPI_COMM_WORLD_RANK"),
        (without(MPICH, "MPI_LOCALRANKID"), "but no MPI_LOCALRANKID"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "2"}, "OMPI_COMM_WORLD_RANK=2 in the environment"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "two"}, "OMPI_COMM_WORLD_SIZE=two in the environment"),
        (MPICH | {"MPI_LOCALNRANKS": "3"}, "MPI_LOCALNRANKS=3 in the environment"),
    ],
)
def test_leftover_and_malformed_variables_are_named_with_what_to_do(environment, said):
    with pytest.raises(ConfigError) as refused:
        launcher(environment)
    text = str(refused.value)
    assert said in text
    assert "unset" in text or "Set it to" in text
    for names in re.findall(r"`unset ([A-Z_ ]+)`", text):  # the advice works
        assert launcher(without(environment, *names.split())) is None


@pytest.mark.parametrize(
    "environment",
    [
        {"MASTER_ADDR": "node0", "MASTER_PORT": "tcp://10.0.0.1:80"},  # of a container; no rank, so nobody meets there
        {"PMI_RANK": "0", "PMI_SIZE": "1"},  # srun's plug-in for MPI, in a single task
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"},
    ],
)
def test_variables_that_say_nothing_of_a_rank_are_no_mistake(environment):
    assert launcher(environment) is None


def test_ranks_of_mpich():
    assert launcher(MPICH).variables["RANK"] == "1"


@pytest.mark.parametrize("visible", ["0,x", "0;1", "NoDevFiles", "-1", "none", "GPU-1b2c,GPU-3d4e", "0,", " 0 , 1 "])
def test_odd_lists_of_gpus_are_counted_as_cuda_counts_them(visible):
    counted = {"0,x": 1, "0;1": 0, "NoDevFiles": 0, "-1": 0, "none": 0, "GPU-1b2c,GPU-3d4e": 2, "0,": 1, " 0 , 1 ": 2}
    gpus = {"CUDA_VISIBLE_DEVICES": visible, "SLURM_GPUS_ON_NODE": "2"}
    assert launcher(TASK | gpus).variables["LOCAL_RANK"] == ("0" if counted[visible] < 2 else "2")
    launcher(TASK | gpus | {"SLURM_GPUS_ON_NODE": "(null)"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("BIGTRAIN_JOIN_SECONDS", value) for value in ("soon", "", "nan", "inf", "0", "-5", "1e300")),
        *(("RAYON_NUM_THREADS", value) for value in ("x", "-1", "2.5", "4,4")),
        *(("OMP_NUM_THREADS", value) for value in ("abc", "4,x", "1e3")),
        ("MKL_NUM_THREADS", "all"),
    ],
)
def test_a_users_setting_that_cannot_be_read_is_refused_before_anything_starts(monkeypatch, name, value):
    for other in (*os.environ.keys() & {"RANK", "WORLD_SIZE"}, "OMP_NUM_THREADS"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(f"{name}={value} in the environment is no ") + f".*`unset {name}`"):
        adopt()
    monkeypatch.delenv(name)
    assert adopt() is None


def test_settings_that_can_be_read(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4, 2")  # of nested regions
    monkeypatch.setenv("RAYON_NUM_THREADS", "0")  # the library's own choice
    monkeypatch.setenv("BIGTRAIN_JOIN_SECONDS", "2.5")
    assert adopt() is None
    assert (threads("OMP_NUM_THREADS"), threads("RAYON_NUM_THREADS"), join_seconds()) == (4, None, 2.5)
    monkeypatch.delenv("BIGTRAIN_JOIN_SECONDS")
    assert join_seconds() == DEFAULT_JOIN_SECONDS


def test_a_command_answers_a_leftover_variable_in_a_sentence(tmp_path):
    config = small_config(tmp_path)
    for command in ("run", "prepare"):
        refused = bigtrain(command, config, variables={"WORLD_SIZE": "two"})
        assert refused.returncode == 2
        assert refused.stderr.startswith("the environment has WORLD_SIZE=two but no RANK")
        assert refused.stderr.count("\n") == 1
        assert refused.stdout == ""
    assert not (tmp_path / "runs").exists()
