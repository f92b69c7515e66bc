"""The house stands as the README draws it: a room imports only from rooms below it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2] / "bigtrain"
FLOORS = [  # from the ground up; rooms of one floor may know each other
    {"masking", "terminal", "errors", "config"},
    {"disk", "run_folder", "pretrained", "state", "tensor_files"},
    {"observability", "resilience", "distributed"},
    {"models", "data"},
    {"tasks"},
    {"optim"},
    {"parallel"},
    {"checkpoint"},
    {"training"},
    {"inference"},
    {"pipeline"},
    {"bench", "preview"},
    {"launching"},
    {"cli", "testing", "__init__", "__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    """The rooms that a file imports at run time: not under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bigtrain":
            yield from [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]


def test_rooms_import_only_from_below():
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 40
    wrong = [
        f"{path.relative_to(ROOT)} imports {other}"
        for path in files
        for other in imports(path)
        if other in FLOOR and FLOOR[other] > FLOOR[room(path)]
    ]
    assert wrong == []


def test_every_room_has_a_floor():
    assert {room(path) for path in ROOT.rglob("*.py")} == set(FLOOR)


def test_no_message_shows_a_value_as_python_writes_it():
    """`literal` of config/files.py writes it as the run's file does."""
    found = {
        str(path.relative_to(ROOT))
        for path in sorted(ROOT.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.FormattedValue) and node.conversion == ord("r"))
        or (isinstance(node, ast.Call) and any(getattr(part, "id", "") == "repr" for part in (node.func, *node.args)))
    }
    # numbers, which YAML writes alike; an error of Python's own; a control character; a hash
    assert found == {"config/files.py", "__init__.py", "launching/job.py", "data/order.py"}
