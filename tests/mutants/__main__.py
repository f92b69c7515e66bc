"""Plant faults one by one, each in a copy of the tree, and see whether the tests that should notice do.

    python -m tests.mutants                     all of them, two at a time
    python -m tests.mutants --only NAME...      some of them
    python -m tests.mutants --check             only whether each fault still has its place in the code

A fault is caught when one of its tests fails, and survives when all pass. The tests that failed must pass on a copy
without a fault. The exit code is 1 if a fault survives that is not marked as known, or a test fails without a fault.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.mutants.faults import FAULTS, Fault

TREE = Path(__file__).parents[2]
COPIED = ("benchmarks", "bigtrain", "configs", "launch", "tests")
TIMEOUT = 900  # seconds; a fault that makes its tests hang is caught too


class Outcome(NamedTuple):
    """caught: by which test, or None. text: what pytest printed."""

    caught: str | None
    seconds: float
    text: str


def place_of(fault: Fault, tree: Path) -> Path:
    """The one file of the package that has the fault's old text. Raises LookupError."""
    places = [
        (path, count)
        for path in sorted((tree / "bigtrain").rglob("*.py"))
        if (count := path.read_text(encoding="utf-8").count(fault.old))
    ]
    if len(places) != 1 or places[0][1] != 1:
        found = ", ".join(f"{path.relative_to(tree)} ({count})" for path, count in places) or "nowhere"
        raise LookupError(f"{fault.name}: its old text must be in the package once; it is in: {found}")
    return places[0][0]


def copy_tree(target: Path) -> None:
    for name in COPIED:
        shutil.copytree(TREE / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in TREE.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, target)


def pytest(tree: Path, tests: list[str]) -> Outcome:
    """Run tests in a copy of the tree until one fails."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "DS_BUILD_OPS": "0"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not soak", "-p", "no:cacheprovider", *tests]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        out.seek(0)
        text = out.read()
    seconds = time.monotonic() - began
    if code is None:
        return Outcome("hangs", seconds, text)
    if code not in (0, 1, 2):  # 2: an error while tests were collected
        raise RuntimeError(f"pytest cannot run {tests}: exit code {code}\n{text}")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+?(?:\[.*?\])?)(?: - |$)", text, re.MULTILINE)
    return Outcome((failed or ["?"])[0] if code else None, seconds, text)


def run(fault: Fault) -> Outcome:
    with tempfile.TemporaryDirectory(prefix=f"{fault.name}-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        path = place_of(fault, tree)
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        return pytest(tree, [argument for tests in fault.tests for argument in shlex.split(tests)])


def fail_without_fault(tests: list[str]) -> bool:
    """Whether one of the tests fails where nothing is wrong."""
    with tempfile.TemporaryDirectory(prefix="clean-") as folder:
        copy_tree(Path(folder))
        outcome = pytest(Path(folder), tests)
        if outcome.caught:
            print(outcome.text)
        return outcome.caught is not None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[fault.name for fault in FAULTS])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--parallel", type=int, default=2)
    options = parser.parse_args()
    by_name = {fault.name: fault for fault in FAULTS}
    assert len(by_name) == len(FAULTS)
    faults = [by_name[name] for name in options.only]
    lost = 0
    for fault in faults:
        try:
            place_of(fault, TREE)
        except LookupError as error:
            lost += 1
            print(error)
    if lost or options.check:
        print(f"{len(faults) - lost} of {len(faults)} faults have a place in the code")
        return 1 if lost else 0
    survivors, catchers = [], {}
    with ThreadPoolExecutor(options.parallel) as pool:
        for fault, outcome in zip(faults, pool.map(run, faults), strict=True):
            if outcome.caught is None:
                survivors.append(fault)
            elif outcome.caught not in ("hangs", "?"):
                catchers[outcome.caught] = fault
            told = f"caught by {outcome.caught}" if outcome.caught else "SURVIVED"
            print(f"{fault.name:45} {outcome.seconds:6.1f} s  {told}", flush=True)
            if outcome.caught == "?":
                print(outcome.text, flush=True)
    print(f"\n{len(faults) - len(survivors)} of {len(faults)} faults are caught.")
    for fault in survivors:
        print(f"survived: {fault.name}{f' (known: {fault.known})' if fault.known else ''}")
    return int(any(not fault.known for fault in survivors) or (bool(catchers) and fail_without_fault([*catchers])))


if __name__ == "__main__":
    sys.exit(main())
