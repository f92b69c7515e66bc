"""`bigtrain launch`: the commands and scripts that it makes, and the wrong input that it answers."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from string import Template

import kubernetes_validate
import pytest
import yaml

from bigtrain.config.files import Loader
from bigtrain.config.texts import written
from bigtrain.errors import ConfigError
from bigtrain.launching import foresight
from bigtrain.launching.clusters import mounted
from bigtrain.launching.commands import COMMANDS
from bigtrain.launching.foresight import room, warnings
from bigtrain.launching.launch import Asked, plan, script
from tests.support import bigtrain, small_config

ROOT = Path(__file__).parents[2]
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
READY = {
    "torchrun.sh": ("torchrun", "--head", "node0"),
    "deepspeed.sh": ("deepspeed", "--hostfile", "launch/hostfile"),
    "accelerate.sh": ("accelerate", "--head", "node0"),
    "slurm.sbatch": ("slurm",),
    "kubernetes.yaml": ("kubernetes", "--image", "registry.example/bigtrain:0.1.0"),
}
LITERAL = "--exclude=SC2016"  # a word with a `$` in it that is not to be expanded
ODD = 'it\'s $HOME; `date` "x" #1'  # for folders and values: everything that a shell might read


def doubled(word):
    """What torchrun reads as this word: it replaces `$NAME`, and `$$` by `$`."""
    return str(word).replace("$", "$$")


@pytest.fixture
def config(tmp_path):
    return small_config(tmp_path)


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """A run's file in a folder with an odd name, its output in another, and an override to match."""
    folder = tmp_path / ODD
    folder.mkdir()
    file = small_config(folder, output=written(f"out {ODD}"))
    monkeypatch.chdir(tmp_path)
    return file.relative_to(tmp_path), (f"stages.pretrain.prompts=['{ODD.replace(chr(39), chr(39) * 2)}']",)


def made(config, launcher, *overrides, **asked):
    return plan(Asked(str(config), overrides, launcher, **asked), here=False)


def command(config, launcher, *overrides, **asked):
    """The launcher's command line, as one line; the run's file is CONFIG in it."""
    words = COMMANDS[launcher](made(config, launcher, *overrides, **asked)).words
    return " ".join("CONFIG" if word == str(config) else word for word in words)


def shellchecked(text, *excluded):
    checked = subprocess.run([SHELLCHECK, *excluded, "-"], input=text, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    return text


def test_torchrun(config):
    assert command(config, "torchrun") == "torchrun --standalone --nproc-per-node 2 -m bigtrain run CONFIG"
    assert command(config, "torchrun", "seed=3", nodes=4, processes=8, head="a.example:4000") == (
        "torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id small --rdzv-endpoint a.example:4000 "
        "--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 180 "
        "-m bigtrain run CONFIG seed=3"
    )
    assert "--rdzv-endpoint [fe80::1]:29400" in command(config, "torchrun", nodes=2, processes=1, head="[fe80::1]")


def test_deepspeed(config):
    assert command(config, "deepspeed") == "deepspeed --num_gpus 2 --module bigtrain run CONFIG"
    assert command(config, "deepspeed", nodes=2, processes=8, hostfile="hosts") == (
        "deepspeed --hostfile hosts --num_nodes 2 --num_gpus 8 --module bigtrain run CONFIG"
    )


def test_accelerate(config):
    same = "--mixed_precision no --dynamo_backend no"
    assert command(config, "accelerate") == (
        f"accelerate launch --multi_gpu --num_processes 2 --num_machines 1 {same} --module bigtrain run CONFIG"
    )
    assert command(config, "accelerate", nodes=2, processes=4, head="node0") == (
        f"accelerate launch --multi_gpu --num_processes 8 --num_machines 2 {same} --rdzv_backend c10d "
        "--machine_rank 0 --main_process_ip node0 --main_process_port 29400 --module bigtrain run CONFIG"
    )
    assert command(config, "accelerate", processes=1) == (
        f"accelerate launch --num_processes 1 --num_machines 1 {same} --module bigtrain run CONFIG"
    )


def test_the_launcher_is_the_one_beside_this_interpreter(config):
    for launcher, module in (
        ("torchrun", "torch.distributed.run"),
        ("deepspeed", "deepspeed.launcher.runner"),
        ("accelerate", "accelerate.commands.launch"),
    ):
        made_here = COMMANDS[launcher](made(config, launcher))
        assert made_here.here[:4] == [sys.executable, "-P", "-m", module]
        assert made_here.here[4:] == made_here.words[len(made_here.program) :]


def test_how_many_processes(config):
    one = ["parallel.processes=auto", "parallel.device=cpu"]
    assert "--nproc-per-node 2" in command(config, "torchrun", *one)
    assert "--nproc-per-node 3" in command(config, "torchrun", *one, processes=3)
    assert "--ntasks-per-node=8" in script(made(config, "slurm", *one, nodes=2))
    assert "--ntasks-per-node=2" in script(made(config, "slurm"))
    with pytest.raises(ConfigError, match=r"--processes: is needed .* parallel.processes \(2\) does not say"):
        made(config, "slurm", nodes=2)
    with pytest.raises(ConfigError, match=r"parallel.replicate: .*\(3\) is no multiple of 2"):
        made(config, "slurm", "parallel.engine=fsdp", "parallel.replicate=2", nodes=3, processes=1)


@pytest.mark.parametrize("name", READY)
def test_the_ready_scripts_are_what_the_command_prints(name):
    launcher, *options = READY[name]
    words = ["--with", launcher, "--nodes", "8", "--processes", "8", *options, "--print"]
    printed = bigtrain("launch", "configs/llama-8b-fsdp-64gpu.yaml", *words, cwd=ROOT)
    assert printed.returncode == 0, printed.stderr
    origin = re.search(r"^# (?:Made by: )?(bigtrain launch .*)$", printed.stdout, re.M)[1]
    assert (ROOT / "launch" / name).read_text() == printed.stdout, f"to make it again: {origin} > launch/{name}"
    assert shlex.split(origin)[1:] == ["launch", "configs/llama-8b-fsdp-64gpu.yaml", *words]
    if name.endswith((".sh", ".sbatch")):
        shellchecked(printed.stdout)
    assert {file.name for file in (ROOT / "launch").iterdir()} == {*READY, "hostfile"}


def test_the_ready_hostfile_has_the_nodes_of_the_ready_script(monkeypatch, config):
    monkeypatch.chdir(ROOT)
    asked = Asked(str(config), (), "deepspeed", nodes=8, processes=8, hostfile="launch/hostfile")
    plan(asked, here=True)
    with pytest.raises(ConfigError, match=r"launch/hostfile: has 8 lines like `node0 slots=8`, --nodes asks for 9"):
        plan(Asked(**{**vars(asked), "nodes": 9}), here=True)
    with pytest.raises(ConfigError, match=r"--hostfile nowhere: cannot be read: No such file"):
        plan(Asked(**{**vars(asked), "hostfile": "nowhere"}), here=True)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "accelerate"])
def test_odd_names_reach_the_launcher_as_they_are(odd, launcher, tmp_path):
    file, overrides = odd
    text = shellchecked(script(made(file, launcher, *overrides)), LITERAL)
    launched = tmp_path / "bin" / launcher
    launched.parent.mkdir()
    launched.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    launched.chmod(0o755)
    path = f"{launched.parent}:{os.environ['PATH']}"
    words = subprocess.run(
        ["bash"], input=text, env={**os.environ, "PATH": path}, capture_output=True, text=True
    ).stdout
    through = doubled if launcher in ("torchrun", "accelerate") else str
    assert words.split("\0")[-4:] == ["run", through(file), *map(through, overrides), ""]


def test_a_comment_cannot_end_before_its_line_does(config):
    text = shellchecked(script(made(config, "torchrun", "stages.pretrain.prompts=['a\n\nexit 3']")))
    comments, _, rest = text.partition("\nset -euo pipefail\n")
    assert all(line.startswith("#") for line in comments.splitlines() if line)
    assert "exit 3" in comments
    assert "exit 3" in rest


def test_deepspeed_refuses_what_its_shells_would_change(config):
    several = {"nodes": 2, "processes": 1, "hostfile": "hosts"}
    assert command(config, "deepspeed", "stages.pretrain.optimizer.betas=[0.9, 0.95]", **several)
    for word in ("name=$HOME", "name='x'", "stages.pretrain.optimizer.betas=[0.9,0.95]", "name=a `b`", "name=a%n"):
        with pytest.raises(ConfigError, match="would change this; write the value into the run's file"):
            made(config, "deepspeed", word, **several)
        with pytest.raises(ConfigError, match=r"unknown key"):  # on one node there is no such shell
            made(config, "deepspeed", word.replace("name", "nam").replace("betas", "beta"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--with", "torchrn"], "--with torchrn: there is no such launcher; did you mean `torchrun`?"),
        (["--with", "torchrun", "--nodes", "0"], "--nodes 0: must be at least 1."),
        (["--with", "slurm", "--processes", "-1"], "--processes -1: must be at least 1."),
        (["--with", "torchrun", "--nodes", "2"], "--head: torchrun on 2 nodes needs it: "),
        (["--with", "accelerate", "--nodes", "2"], "--head: accelerate on 2 nodes needs it: "),
        (["--with", "deepspeed", "--nodes", "2"], "--hostfile: deepspeed on 2 nodes needs it: "),
        (["--with", "kubernetes"], "--image: kubernetes needs it: "),
        (["--with", "torchrun", "--head", "a"], "--head: torchrun on one node has no use for it; leave it out."),
        (["--with", "slurm", "--image", "a"], "--image: slurm on one node has no use for it; leave it out."),
        (["--with", "deepspeed", "--hostfile", "a"], "--hostfile: deepspeed on one node has no use for it"),
        (["--with", "torchrun", "--nodes", "2", "--head", "a:b"], "--head a:b: is no HOST or HOST:PORT"),
        (["--with", "torchrun", "--nodes", "2", "--head", "a:65536"], "--head a:65536: is no HOST or HOST:PORT"),
        (["--with", "slurm", "nam=x"], "command line: nam: unknown key; did you mean `name`?"),
        (["--with", "torchrun", "nam=x"], "command line: nam: unknown key; did you mean `name`?"),
        (["--with", "slurm"], "--with slurm: sbatch is not on the PATH of this machine; install it, or take"),
        (["--with", "kubernetes", "--image", "a"], "--with kubernetes: kubectl is not on the PATH of this machine"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_answered_in_a_sentence(config, words, message):
    refused = bigtrain("launch", config, *words, variables={"PATH": ""})
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.startswith(message)
    assert refused.stderr.count("\n") == 1


def test_what_is_not_on_this_disk_is_asked_for_only_where_the_run_starts(config):
    missing = "stages.pretrain.data.0.source=nowhere/*.jsonl"
    with pytest.raises(ConfigError, match=r"no file matches nowhere/\*.jsonl"):
        plan(Asked(str(config), (missing,), "torchrun"), here=True)
    plan(Asked(str(config), (missing,), "slurm"), here=True)


def test_printing_does_not_import_torch(config):
    program = (
        "import sys; from bigtrain.launching.launch import Asked, launch; "
        f"launch(Asked({str(config)!r}, (), 'torchrun'), print_only=True); "
        "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


# --- Slurm: the script itself is run, with an srun and a scontrol that note what they are asked for ---

# The step: says that it has begun, and ends with the code that it is given, or when it is told to.
SRUN = f"""#!{sys.executable}
import os, pathlib, signal, sys
at, mark = pathlib.Path(os.environ["AT"]), pathlib.Path(os.environ["MARK"])

def told(number, frame):
    (at / "signal").write_text(signal.Signals(number).name)
    if os.environ["SAVES"]:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    sys.exit(75)

signal.signal(signal.SIGUSR1, told)
(at / "srun").write_text("\\n".join(sys.argv[1:]))
(at / "begun").write_text("yes")
sys.exit(int((at / "end").read_text()))
"""
SCONTROL = """#!/bin/sh
echo "$@" >"$AT/scontrol"
"""


class BatchJob:
    """The batch script as a job: `saves` says whether the step leaves the mark when it is told to end."""

    def __init__(self, text, folder, mark, saves):
        self.at, programs = folder / "told", folder / "programs"
        self.at.mkdir()
        programs.mkdir()
        os.mkfifo(self.at / "end")
        for name, program in ("srun", SRUN), ("scontrol", SCONTROL):
            (programs / name).write_text(program)
            (programs / name).chmod(0o755)
        metadata = {"AT": self.at, "SAVES": "yes" if saves else "", "MARK": mark}
        metadata |= {"SLURM_JOB_ID": "4321", "SLURM_CPUS_PER_TASK": "8", "PATH": f"{programs}:{os.environ['PATH']}"}
        (folder / "job.sbatch").write_text(text)
        environment = {**os.environ, **{key: str(fact) for key, fact in metadata.items()}}
        self.process = subprocess.Popen(["bash", "job.sbatch"], cwd=folder, env=environment, start_new_session=True)
        while not (self.at / "begun").exists():
            assert self.process.poll() is None, "the script ended before it called srun"
            time.sleep(0.01)

    def told(self, program):
        """What a program was asked for; None: it was not called."""
        return (self.at / program).read_text() if (self.at / program).exists() else None

    def kill(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ended(self, code=None):
        """Wait for the script; code: what the step ends with, of itself."""
        if code is not None:
            (self.at / "end").write_text(f"{code}\n")
        return self.process.wait(timeout=60)


@pytest.fixture
def batch(odd, tmp_path, request):
    """A function that starts the batch script; nothing of it is left after the test."""

    def start(saves=True):
        file, overrides = odd
        text = shellchecked(script(made(file, "slurm", *overrides, nodes=2, processes=3)), LITERAL)
        job = BatchJob(text, tmp_path, tmp_path / f"out {ODD}" / "small" / "preempted", saves)
        request.addfinalizer(job.kill)
        return job

    return start


def test_slurm_starts_the_ranks_with_srun(odd, batch):
    job = batch()
    assert job.ended(0) == 0
    file, overrides = odd
    assert job.told("srun").splitlines() == [
        *("--kill-on-bad-exit=0", "--wait=180", "--cpus-per-task=8"),
        *("bigtrain", "run", str(file), *overrides),
    ]
    assert job.told("signal") is None
    assert job.told("scontrol") is None


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_forwards_the_signal_and_goes_back_into_the_queue(batch, number):
    job = batch()
    job.process.send_signal(number)
    assert job.ended() != 0
    assert job.told("signal") == "SIGUSR1"
    assert job.told("scontrol") == "requeue Incomplete 4321\n"


def test_slurm_does_not_go_back_without_a_save(batch):
    job = batch(saves=False)
    job.process.send_signal(signal.SIGUSR1)
    assert job.ended() != 0
    assert job.told("signal") == "SIGUSR1"
    assert job.told("scontrol") is None


def test_slurm_passes_a_failure_on_and_an_old_mark_does_not_count(batch, tmp_path):
    mark = tmp_path / f"out {ODD}" / "small" / "preempted"
    mark.parent.mkdir(parents=True)
    mark.touch()
    job = batch()
    assert job.ended(1) == 1
    assert job.told("scontrol") is None
    assert not mark.exists()


def test_slurm_settings(config):
    lines = script(made(config, "slurm", "name=r.1", "parallel.device=cuda", nodes=2, processes=3)).splitlines()
    settings = [line.split(" #")[0].split()[1] for line in lines if line.startswith("#SBATCH")]
    assert settings == [
        *("--job-name=r.1", "--nodes=2", "--ntasks-per-node=3", "--gpus-per-node=3", "--cpus-per-task=8"),
        *("--exclusive", "--mem=0", "--signal=B:USR1@180", "--requeue", "--open-mode=append", "--output=%x-%j.out"),
    ]
    assert "--gpus-per-node" not in script(made(config, "slurm", "parallel.device=cpu"))


def submitted(tmp_path, config, program, *words):
    """What a stand-in for sbatch or kubectl is given, and how `bigtrain launch` ends when it ends with `code`."""
    tool = tmp_path / "bin" / program
    tool.parent.mkdir(exist_ok=True)
    tool.write_text('#!/bin/sh\necho "$@" >"$0.words"; echo "$PATH" >"$0.path"; cat >"$0.script"; exit "$CODE"\n')
    tool.chmod(0o755)
    printed = bigtrain("launch", config, *words, "--print").stdout
    path = f"{tool.parent}:/usr/bin:/bin"
    for code in (0, 7):
        done = bigtrain("launch", config, *words, variables={"PATH": path, "CODE": str(code)})
        assert done.returncode == (1 if code else 0), done.stderr
        assert tool.with_suffix(".script").read_text() == printed
    return tool.with_suffix(".words").read_text().split(), tool.with_suffix(".path").read_text().split(":")


def test_slurm_and_kubernetes_get_the_script_on_standard_input(tmp_path, config):
    words, path = submitted(tmp_path, config, "sbatch", "--with", "slurm", "--nodes", "2", "--processes", "4")
    assert words == []
    assert path[0] == str(Path(sys.executable).parent)  # where the job finds bigtrain
    words, _ = submitted(tmp_path, config, "kubectl", "--with", "kubernetes", "--image", "a")
    assert words == ["apply", "-f", "-"]


# --- Kubernetes ---


def objects(text):
    """The objects by kind, each checked against the schema of the oldest and the newest Kubernetes that we mean."""
    found = list(yaml.safe_load_all(text))
    for one in found:
        for version in ("1.31", kubernetes_validate.latest_version()):
            kubernetes_validate.validate(one, version, strict=True)
    return {one["kind"]: one for one in found}


def kubernetes(config, *overrides, nodes=3, processes=4, **asked):
    asked = {"nodes": nodes, "processes": processes, "image": "registry.example/bigtrain:1", **asked}
    return objects(script(made(config, "kubernetes", *overrides, **asked)))


def test_kubernetes_objects_fit_together(config):
    found = kubernetes(config)
    assert set(found) == {"PersistentVolumeClaim", "ConfigMap", "Service", "Job"}
    assert {one["metadata"]["name"] for one in found.values()} == {"bigtrain-small"}
    job, pod = found["Job"]["spec"], found["Job"]["spec"]["template"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 3, 3)
    assert found["Service"]["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert found["Service"]["spec"]["clusterIP"] == "None"
    assert pod["spec"]["subdomain"] == found["Service"]["metadata"]["name"]
    [container] = pod["spec"]["containers"]
    assert container["image"] == "registry.example/bigtrain:1"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    assert {volume["name"] for volume in pod["spec"]["volumes"]} == {at["name"] for at in container["volumeMounts"]}
    assert found["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert found["ConfigMap"]["data"] == {"config.yaml": config.read_text()}
    grace, words = pod["spec"]["terminationGracePeriodSeconds"], container["command"]
    assert int(words[words.index("--shutdown-timeout") + 1]) < grace


def test_kubernetes_pods_run_torchrun_and_meet_at_the_first(config):
    [container] = kubernetes(config, "seed=3")["Job"]["spec"]["template"]["spec"]["containers"]
    assert " ".join(container["command"]) == (
        "python -P -m bigtrain.launching.elastic --nnodes 3 --node-rank $(JOB_COMPLETION_INDEX) --nproc-per-node 4 "
        "--rdzv-backend static --rdzv-id small --rdzv-endpoint bigtrain-small-0.bigtrain-small:29400 "
        "--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 180 "
        "-m bigtrain run /etc/bigtrain/config.yaml seed=3"
    )


def test_kubernetes_goes_on_after_a_preemption_and_ends_at_wrong_input(config):
    job = kubernetes(config)["Job"]["spec"]
    codes = {
        code: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert codes == {2: "FailJob", 75: "Ignore", 143: "Ignore"}
    assert job["podFailurePolicy"]["rules"][-1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # what a podFailurePolicy asks for
    assert job["backoffLimit"] == 9


@pytest.mark.parametrize(
    ("output", "folder"),
    [("runs", "/workspace"), ("./a/../runs", "/workspace"), ("/shared/runs", "/shared/runs"), ("../up", "/up")],
)
def test_kubernetes_keeps_the_output_on_the_shared_disk(config, output, folder):
    [container] = kubernetes(config, f"output={output}")["Job"]["spec"]["template"]["spec"]["containers"]
    [mount] = [at["mountPath"] for at in container["volumeMounts"] if at["name"] == "shared"]
    assert (mount, container["workingDir"]) == (folder, folder)


def test_kubernetes_asks_for_what_a_run_needs_and_for_no_rights(config):
    found = kubernetes(config, nodes=2, processes=4)
    pod = found["Job"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["resources"]["requests"] == {"cpu": 32, "memory": "37Gi"}  # a copy of the state is less than 1 GiB
    [memory] = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "memory"]
    assert memory == {"medium": "Memory", "sizeLimit": "4Gi"}
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsUser"] > 0
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert (pod["automountServiceAccountToken"], pod["enableServiceLinks"]) == (False, False)
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment["HOME"] == container["workingDir"]


def test_the_claim_follows_from_the_plan(config):
    def plan_of(*overrides):
        found = room(made(config, "kubernetes", *overrides, nodes=2, processes=4, image="a"))
        return found.disk, found.told

    wide = "model.from_config={model_type: llama, hidden_size: 4096, intermediate_size: 14336, num_hidden_layers: 32, "
    wide += "num_attention_heads: 32, num_key_value_heads: 8, vocab_size: 128256, max_position_embeddings: 128}"
    least, told = plan_of(wide)  # 8,030,261,248 parameters: 89.75 GiB a checkpoint, 3 of them in each of the two stages
    assert told.startswith("Checkpoints 539 GiB, exports 60 GiB, token stores at most 1 GiB")
    assert least == 718  # 1.2 * (538.47 + 59.83), rounded up
    more, told = plan_of(wide, "stages.pretrain.checkpoint={every: 1, keep: 5}", "stages.finetune.export=false")
    assert told.startswith("Checkpoints 808 GiB, exports 30 GiB")
    assert more > least
    kept = "stages.pretrain.checkpoint={every: 1, keep_every: 2, keep_weights_only: true}"  # of 6 steps: 2, 4 and 6
    assert plan_of(wide, kept)[1].startswith("Checkpoints 629 GiB")
    unknown = ("model={from_pretrained: owner/name}", "tokenizer=null")
    assert plan_of(*unknown) == (None, "A guess, as the model's size is not known without loading owner/name.")
    assert kubernetes(config, *unknown)["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"] == "1024Gi"


@pytest.mark.parametrize("output", ["~/runs", "$HOME/runs"])
def test_kubernetes_refuses_an_output_that_is_another_folder_in_the_pods(config, output):
    with pytest.raises(ConfigError, match=r"output: .*, and another folder in the pods"):
        kubernetes(config, f"output={output}")


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """A run's file that reads and writes below the working folder, which counts as shared; its stages have 5 rows."""
    monkeypatch.setattr(foresight, "NODE_LOCAL", ("/dev/shm",))
    monkeypatch.setattr(foresight.tempfile, "gettempdir", lambda: "/tmp/of-this-machine")
    file = small_config(tmp_path, output="runs")
    values = yaml.safe_load(file.read_text())
    for stage in values["stages"]:
        stage["data"] = [{"source": "data/*.jsonl"}]
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


@pytest.mark.parametrize(
    ("launcher", "nodes", "override", "key"),
    [
        ("slurm", 1, "output=/dev/shm/runs", "output"),
        ("slurm", 2, "stages.pretrain.data.0.source=/tmp/of-this-machine/a", "stages.pretrain.data.0.source"),
        ("torchrun", 2, "output=/dev/shm/runs", "output"),
        ("torchrun", 2, "stages.finetune.evaluate={data: [{source: /dev/shm/a}]}", "stages.finetune.evaluate.data.0.source"),  # noqa: E501
        ("accelerate", 2, "model={from_pretrained: /dev/shm/model}", "model.from_pretrained"),
        ("deepspeed", 2, "output=/dev/shm", "output"),
        ("kubernetes", 2, "stages.pretrain.data.0.source=/home/me/a.jsonl", "stages.pretrain.data.0.source"),
        ("kubernetes", 1, "stages.pretrain.data.0.source=../a.jsonl", "stages.pretrain.data.0.source"),
        ("kubernetes", 1, "model={from_pretrained: /models/a}", "model.from_pretrained"),
        ("kubernetes", 1, "tokenizer={from_pretrained: /models/a}", "tokenizer.from_pretrained"),
        ("kubernetes", 2, "output=/shared/runs", None),  # which is where the claim is mounted
        ("kubernetes", 2, "stages.pretrain.data.0.source=s3://bucket/a.jsonl", None),
        ("kubernetes", 2, "stages.pretrain.data.0.source=/workspace/a.jsonl", None),
        ("torchrun", 1, "output=/dev/shm/runs", None),
        ("slurm", 2, "seed=1", None),
        ("torchrun", 2, "stages.pretrain.data.0.source=stdlib", None),
    ],
)  # fmt: skip
def test_what_the_nodes_will_not_see_is_told(shared, launcher, nodes, override, key):
    asked = {"torchrun": {"head": "a"}, "accelerate": {"head": "a"}, "deepspeed": {"hostfile": "a"}}
    options = asked.get(launcher, {}) if nodes > 1 else {}
    options |= {"image": "a"} if launcher == "kubernetes" else {}
    overrides = [override] + ["stages.finetune.held_out=0"] * ("evaluate" in override)
    job = made(shared, launcher, *overrides, nodes=nodes, processes=2, **options)
    told = warnings(job, mounted(job) if launcher == "kubernetes" else None)
    assert [text.partition(": ")[0] for text in told] == ([key] if key else [])


def test_ranks_without_rows_are_told(shared):
    assert warnings(made(shared, "slurm", nodes=1, processes=5)) == []
    told = warnings(made(shared, "slurm", nodes=2, processes=4))
    assert told[0].startswith(
        "stages.pretrain.global_batch_size: 5 rows a step for 8 processes: 3 of them have none, and compute rows that "
        "do not count. Start at most 5, or raise it."
    )
    assert len(told) == 2


def test_warnings_do_not_stand_in_the_script(shared):
    words = ["--with", "slurm", "--nodes", "2", "--processes", "4", "--print"]
    printed = bigtrain("launch", shared, *words, cwd=shared.parent, env=dict(os.environ))
    assert printed.returncode == 0
    assert printed.stdout.startswith("#!/usr/bin/env bash\n")
    assert "warning: " not in printed.stdout
    assert "warning: stages.pretrain.global_batch_size: 5 rows a step for 8 processes" in printed.stderr


def test_a_run_file_that_is_not_there_is_answered(tmp_path):
    for config, message in (
        ("nothing.yaml", "nothing.yaml: there is no such file."),
        (".", ".: is a folder; give the run's file."),
    ):
        for words in (["--with", "slurm", "--print"], ["--with", "torchrun"]):
            refused = bigtrain("launch", config, *words, cwd=tmp_path)
            assert refused.returncode == 2
            assert refused.stderr.startswith(message)


@pytest.mark.parametrize(
    "text", ["# tab\there  \n", "# no end", "\n\n  # spaces first\n", "# \u65e5\u672c \U0001f600\r\n"]
)
def test_kubernetes_holds_any_file_as_it_is(config, text):
    with config.open("a", newline="") as file:
        file.write(text)
    held = kubernetes(config)["ConfigMap"]["data"]["config.yaml"]
    assert held == config.read_text()
    assert yaml.load(held, Loader)["name"] == "small"


def test_kubernetes_holds_odd_words_as_they_are(odd):
    file, overrides = odd
    found = kubernetes(file, *overrides, "stages.finetune.prompts=['$(HOME) $$']")
    *_, first, second = found["Job"]["spec"]["template"]["spec"]["containers"][0]["command"]
    by_kubernetes = [re.sub(r"\$\$", "$", word) for word in (first, second)]
    by_torchrun = [Template(word).safe_substitute(local_rank="0") for word in by_kubernetes]
    assert by_torchrun == [*overrides, "stages.finetune.prompts=['$(HOME) $$']"]
    assert json.dumps(found["ConfigMap"]["data"]["config.yaml"]) == json.dumps(file.read_text())


@pytest.mark.parametrize(
    ("name", "object_name"),
    [("A.b_c-", "bigtrain-a-b-c"), ("7b", "bigtrain-7b"), ("x" * 80, "bigtrain-" + "x" * 52)],
)
def test_kubernetes_names_are_dns_labels(config, name, object_name):
    found = kubernetes(config, f"name={name}")
    assert found["Job"]["metadata"]["name"] == object_name
    assert len(f"{object_name}-2") <= 63
