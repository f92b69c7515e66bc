import os
import sys

if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()):  # noqa: PTH109 - pathlib may be a file there
    del sys.path[
        0
    ]  # `python -m` puts the working folder first: its files would stand before Python's and the libraries'

from bigtrain.cli import main

main()
