"""Several hosts: Linux network namespaces with an address and a name of their own, joined by a bridge.

What a real cluster does, and one machine otherwise does not: names to look up, a rank 0 elsewhere, nothing on loopback.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
import yaml

from bigtrain.launching.launch import Asked, plan, script
from bigtrain.observability.stream import read_metrics
from tests.support import bigtrain, small_config

pytestmark = pytest.mark.soak
NETWORK = "10.77.0"  # only inside the namespaces; the machine itself has no address in it
MEETING = "bigtrain-small-0.bigtrain-small"  # what Kubernetes' DNS would call the first pod
BECOME = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


class Hosts:
    """`count` hosts named host-1, host-2, ... with the addresses 10.77.0.1, 10.77.0.2, ..."""

    def __init__(self, count, folder):
        self.names = [f"host-{number}" for number in range(1, count + 1)]
        self.spaces = [f"bigtrain-{os.getpid()}-{number}" for number in range(count + 1)]  # the first holds the bridge
        self.folder, self.running = folder, []
        self.file = folder / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{NETWORK}.{i} {name}" for i, name in enumerate(self.names, 1))]
        self.file.write_text("\n".join(lines) + f" \n{NETWORK}.1 {MEETING}\n")

    def join(self):
        """Make them and join them; skips the test where the machine refuses."""
        bridge, *spaces = self.spaces
        self._ip("netns", "add", bridge)
        self._ip("-n", bridge, "link", "add", "switch", "type", "bridge")
        self._ip("-n", bridge, "link", "set", "switch", "up")
        for number, space in enumerate(spaces, 1):
            self._ip("netns", "add", space)
            port = f"port{number}"
            self._ip("-n", bridge, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
            self._ip("-n", bridge, "link", "set", port, "master", "switch", "up")
            self._ip("-n", space, "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                self._ip("-n", space, "link", "set", device, "up")
        tried = subprocess.run([self.shell(0), "true"], capture_output=True, text=True)
        if tried.returncode:
            pytest.skip(f"this machine cannot make hosts: {tried.stderr.strip()}")

    def end(self):
        """End what still runs on them, and take them away."""
        for space in self.spaces:
            inside = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout
            for process in map(int, inside.split()):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)
        for process in self.running:
            process.kill()
            process.wait()

    def shell(self, number):
        """A program that runs its words on a host."""
        file = self.folder / self.names[number]
        become = ["unshare", "--uts", "--mount", "sh", "-c", BECOME, "sh", self.names[number], str(self.file)]
        file.write_text(
            f'#!/bin/sh\nexec {shlex.join(["ip", "netns", "exec", self.spaces[number + 1], *become])} "$@"\n'
        )
        file.chmod(0o755)
        return file

    def start(self, name, *command, **environment):
        """Start a command; what it prints goes to FOLDER/NAME.log."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        with (self.folder / f"{name}.log").open("w") as log:
            words = list(map(str, command))
            process = subprocess.Popen(words, stdout=log, stderr=log, cwd=self.folder, env=environment)
        self.running.append(process)
        return process

    def run_on_all(self, command):
        """Run command(number) on every host to its end, which must be a good one."""
        for number, name in enumerate(self.names):
            self.start(name, self.shell(number), *command(number))
        self.end_well()

    def end_well(self):
        """Wait for what was started; all of it must end well."""
        codes = [process.wait(timeout=600) for process in self.running]
        assert not any(codes), "\n".join(log.read_text()[-3000:] for log in self.folder.glob("*.log"))

    def _ip(self, *words):
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this machine cannot make hosts: `ip {' '.join(words)}` says {done.stderr.strip()}")


@pytest.fixture
def hosts(tmp_path, request):
    """A function that makes hosts; they are gone after the test, however it ends."""
    missing = [tool for tool in ("ip", "unshare", "mount", "hostname") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"this machine cannot make hosts: {', '.join(missing)} is not installed")
    if os.geteuid() != 0:
        pytest.skip("this machine cannot make hosts: network namespaces need root")

    def make(count):
        made = Hosts(count, tmp_path)
        request.addfinalizer(made.end)
        made.join()
        return made

    return make


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of the run on one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = bigtrain("run", small_config(folder), "parallel.processes=1")
    assert done.returncode == 0, done.stderr
    return losses(folder)


# DeepSpeed asks ssh whether a node is there and for its address, and has pdsh run a command on all of them, in a shell.
SSH = """#!/usr/bin/env python3
import sys
host = next(word for word in sys.argv if word.startswith("host-"))
print(f"{NETWORK}.{host[5:]}" if sys.argv[-1] == "-I" else host)
"""
PDSH = """#!/usr/bin/env python3
import subprocess, sys
at = sys.argv.index("-w")
hosts, command = sys.argv[at + 1].split(","), " ".join(sys.argv[at + 2 :])
commands = [[f"./{host}", "bash", "-c", command.replace("%n", str(i))] for i, host in enumerate(hosts)]
ranks = list(map(subprocess.Popen, commands))
sys.exit(max(rank.wait() for rank in ranks))
"""


def losses(folder):
    rows = read_metrics(folder / "runs" / "small")
    return {(row["kind"], row["stage"], row["step"]): row["loss"] for row in rows}


def agrees(folder, alone, processes):
    """The run in this folder had so many processes, and the losses of the one that was alone."""
    metadata = json.loads((folder / "runs" / "small" / "run.json").read_text())
    assert [attempt["world_size"] for attempt in metadata["attempts"]] == [processes]
    found = losses(folder)
    assert found.keys() == alone.keys()
    assert found == {key: pytest.approx(loss, rel=1e-6) for key, loss in alone.items()}


@pytest.mark.parametrize(("count", "engine"), [(2, "zero2"), (2, "fsdp"), (3, "zero3"), (3, "ddp")])
def test_hosts_under_torchrun_train_what_one_process_trains(hosts, tmp_path, alone, count, engine):
    config = small_config(tmp_path)
    words = ["--with", "torchrun", "--nodes", count, "--processes", 1, "--head", f"{NETWORK}.1"]
    words = [sys.executable, "-m", "bigtrain", "launch", config, f"parallel.engine={engine}", *words]
    hosts(count).run_on_all(lambda _: words)
    agrees(tmp_path, alone, count)


def test_hosts_under_accelerate_train_what_one_process_trains(hosts, tmp_path, alone):
    config = small_config(tmp_path)
    words = ["--with", "accelerate", "--nodes", 2, "--processes", 1, "--head", "host-1:4000"]
    hosts(2).run_on_all(lambda _: [sys.executable, "-m", "bigtrain", "launch", config, *words])
    agrees(tmp_path, alone, 2)


def test_hosts_under_deepspeed_train_what_one_process_trains(hosts, tmp_path, alone):
    config, two = small_config(tmp_path), hosts(2)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in ("ssh", SSH.replace("{NETWORK}", NETWORK)), ("pdsh", PDSH):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    for number in range(2):
        two.shell(number)
    (tmp_path / "hostfile").write_text("host-1 slots=8\nhost-2 slots=8\n")
    words = ["--with", "deepspeed", "--nodes", 2, "--processes", 1, "--hostfile", "hostfile"]
    prompts = "stages.pretrain.prompts=[it's, two#; (words)]"  # what a shell would change
    path = f"{programs}:{os.environ['PATH']}"
    two.start("launcher", sys.executable, "-m", "bigtrain", "launch", config, prompts, *words, PATH=path)
    two.end_well()
    agrees(tmp_path, alone, 2)
    resolved = yaml.safe_load((tmp_path / "runs" / "small" / "config.yaml").read_text())
    assert resolved["stages"][0]["prompts"] == ["it's", "two#; (words)"]


def test_the_pods_of_the_kubernetes_script_train_what_one_process_trains(hosts, tmp_path, alone):
    asked = Asked(str(small_config(tmp_path)), (), "kubernetes", nodes=2, processes=1, image="bigtrain")
    found = {one["kind"]: one for one in yaml.safe_load_all(script(plan(asked, here=True)))}
    mounted = tmp_path / "config.yaml"
    mounted.write_text(found["ConfigMap"]["data"]["config.yaml"])
    [container] = found["Job"]["spec"]["template"]["spec"]["containers"]

    def pod(number):
        """The container's command, with what Kubernetes and the image would put in its place."""
        here = {
            "python": sys.executable,
            "$(JOB_COMPLETION_INDEX)": number,
            "/etc/bigtrain/config.yaml": mounted,
        }
        return [here.get(word, word) for word in container["command"]]

    hosts(2).run_on_all(pod)
    agrees(tmp_path, alone, 2)
