"""torchrun that ends with the exit code of the rank that failed first: `python -m bigtrain.launching.elastic ...`.

torchrun itself ends with 1 whatever happened, and who starts it again cannot tell a preempted run from wrong input.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from bigtrain.terminal import say


def main(arguments: list[str]) -> int:
    """Run torchrun with these arguments; returns the exit code, 128 + N for what ended by signal N, as shells do."""
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        say(str(error), error=True)
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as signal:
        say(str(signal), error=True)
        return 128 + signal.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
