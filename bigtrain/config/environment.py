"""Environment variables with which `bigtrain run` speaks to the ranks that it starts, and how a rank says why it ends.

Free of torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

FAILURE_FILE = "BIGTRAIN_FAILURE_FILE"  # where a rank writes why it failed
PROCESSES_WHY = "BIGTRAIN_PROCESSES_WHY"  # in words, why there are as many ranks as there are
JOIN_SECONDS = "BIGTRAIN_JOIN_SECONDS"  # how long the ranks wait for each other at the start; set by a user, or absent


def tell(text: str, code: int) -> None:
    """Say why this process ends: to the parent that spawned it, or to the terminal."""
    file = os.environ.get(FAILURE_FILE)
    if file is None:
        print(text, file=sys.stderr, flush=True)
        return
    partial = Path(file).with_suffix(".partial")
    failure: dict[str, Any] = {"text": text, "code": code, "time": time.time()}
    partial.write_text(json.dumps(failure))
    partial.replace(file)
