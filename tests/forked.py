"""The real command in a fork of a process that has imported its libraries already: a rank starts in 0.1 s instead of 5.

Tests of the start itself, of environments and of launchers start real processes instead (`tests.support.bigtrain` with
`env`).
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

SERVER = multiprocessing.get_context("forkserver")


def run_command(arguments, cwd=None, timeout=900, variables=None, module="bigtrain"):
    """As `subprocess.run` of `python -m MODULE ARGUMENTS`, with its output as text.

    variables: of the environment, besides those of this process. What a library reads of them when it is imported has
    no effect.
    """
    return run_commands([(arguments, cwd, variables)], timeout, module)[0]


def run_commands(commands, timeout=900, module="bigtrain"):
    """As `run_command` of each of [(arguments, cwd, variables)], all at once."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder) / f"{i}.out", Path(folder) / f"{i}.err") for i in range(len(commands))]
        processes = []
        for (arguments, cwd, variables), (out, err) in zip(commands, outputs, strict=True):
            environment = {**os.environ, **(variables or {})}
            there = str(Path.cwd() if cwd is None else cwd)
            processes.append(
                SERVER.Process(target=_command, args=(module, arguments, there, environment, str(out), str(err)))
            )
            processes[-1].start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process for process in processes if process.exitcode is None]
        for process in late:
            process.kill()
            process.join()
        said = [(out.read_text(), err.read_text()) for out, err in outputs]
        if late:
            raise subprocess.TimeoutExpired([command[0] for command in commands], timeout, f"{said}")
        return [
            subprocess.CompletedProcess(arguments, process.exitcode, out, err)
            for (arguments, *_), process, (out, err) in zip(commands, processes, said, strict=True)
        ]


def call(function, *arguments):
    """The result of an importable function in a process of its own, whose imports are done. Runs that it starts have
    ranks that are forks too."""
    here, there = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_answer, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        failed, value = here.recv()
    finally:
        process.join()
    assert not failed, value
    return value


def _answer(pipe, function, arguments):
    _fork_ranks()
    try:
        pipe.send((False, function(*arguments)))
    except BaseException:  # noqa: BLE001 - handed to the caller
        pipe.send((True, traceback.format_exc()))


def living(folder):
    """The processes of this machine that work in a folder or below it, but this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if process.name != str(os.getpid()) and Path(folder) in [
                (where := (process / "cwd").readlink()),
                *where.parents,
            ]:
                found.append(process.name)
    return found


def start_command(*arguments, cwd=None):
    """As `subprocess.Popen` of `python -m bigtrain ARGUMENTS`, with its output and errors in one pipe, as text."""
    return Started([*map(str, arguments)], Path.cwd() if cwd is None else cwd)


def _command(module, arguments, cwd, environment, out, err):
    for path, descriptor in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    _launch(arguments, cwd, environment, module)


def _started(arguments, cwd, environment, pipe):
    os.dup2(pipe.fileno(), 1)
    os.dup2(pipe.fileno(), 2)
    pipe.close()
    _launch(arguments, cwd, environment)


def _launch(arguments, cwd, environment, module="bigtrain"):
    os.chdir(cwd)
    _fork_ranks()
    _run(arguments, environment, module)


def _fork_ranks():
    """Let the local launcher fork the ranks."""
    from bigtrain.launching import spawn

    spawn.subprocess = SimpleNamespace(Popen=Rank, TimeoutExpired=subprocess.TimeoutExpired)


def _run(arguments, environment, module="bigtrain"):
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = ["", *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]  # as `python -m` does
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class Forked:
    """A process of multiprocessing with what the tests and the local launcher use of `subprocess.Popen`."""

    def __init__(self, process):
        self._process = process
        process.start()

    @property
    def pid(self):
        return self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a rank", timeout)
        return self._process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Started(Forked):
    """A command; `stdout` ends when the last of its processes has ended."""

    def __init__(self, arguments, cwd):
        here, there = SERVER.Pipe(duplex=False)
        super().__init__(SERVER.Process(target=_started, args=(arguments, str(cwd), dict(os.environ), there)))
        there.close()
        self.stdout = os.fdopen(os.dup(here.fileno()), encoding="utf-8")
        here.close()


class Rank(Forked):
    """A rank that the local launcher starts."""

    def __init__(self, command, *, env, preexec_fn):
        assert command[:4] == [sys.executable, "-P", "-m", "bigtrain"], command
        fork = multiprocessing.get_context("fork")
        super().__init__(fork.Process(target=self._begin, args=(command[4:], env, preexec_fn)))

    @staticmethod
    def _begin(arguments, environment, preexec_fn):
        preexec_fn()
        _run(arguments, environment)
