"""The house stands as the README draws it: a room imports only from rooms below it."""

import ast
import itertools
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

NUM_TAKERS = 66  # functions that are given the whole run's file
LONG: list[str] = []


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def at_run_time(path):
    """The nodes of a file, but for those under TYPE_CHECKING; imports within functions too."""
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    return [node for node in ast.walk(tree) if node not in typing_only]


def module_of(path):
    return ".".join(("bigtrain", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def imports(path):
    """The modules of the package that a file imports at run time."""
    for node in at_run_time(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bigtrain":
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                yield below if below in MODULES else node.module


FILES = sorted(ROOT.rglob("*.py"))
MODULES = {module_of(path): path for path in FILES}


def test_rooms_import_only_from_below():
    assert len(FILES) > 40
    wrong = [
        f"{path.relative_to(ROOT)} imports {other}"
        for path in FILES
        for other in imports(path)
        if other != "bigtrain" and FLOOR[room(MODULES[other])] > FLOOR[room(path)]
    ]
    assert wrong == []


def test_no_file_imports_itself_through_others():
    above = {module: set(imports(path)) - {module} for module, path in MODULES.items()}
    while free := [module for module, others in above.items() if not others & set(above)]:
        for module in free:
            del above[module]
    assert above == {}


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    too_long = {name: length for name, length in lengths.items() if length > 400}
    assert set(too_long) <= set(LONG), too_long
    assert set(LONG) <= set(too_long), "these are short now: take them off the list"


def given(function):
    """The parameters of a function that are the whole run's file."""
    arguments = (*function.args.args, *function.args.kwonlyargs)
    return {one.arg for one in arguments if one.annotation and "RunConfig" in ast.unparse(one.annotation).split(" | ")}


def takers():
    """The functions and methods that are given the whole run's file, by (module, name)."""
    found = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            for function in node.body if isinstance(node, ast.ClassDef) else [node]:
                if isinstance(function, ast.FunctionDef) and given(function):
                    owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                    found[module, owner + function.name] = function
    return found


def handed(module, function, takers):
    """Whom a function hands the run's file to, in the order of its lines."""
    imported = {
        alias.name: node.module
        for node in ast.walk(ast.parse(MODULES[module].read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: (call.end_lineno, call.end_col_offset)):
        values = [ast.unparse(value) for value in (*call.args, *(keyword.value for keyword in call.keywords))]
        if not given(function) & set(values):
            continue
        name = ast.unparse(call.func)
        owner, _, method = name.rpartition(".")
        where = imported.get(owner or name, module)
        own = [(where, name), (where, f"{name}.__init__")]
        methods = [key for key in takers if method and key[1].endswith(f".{method}") and owner not in imported]
        methods.sort(key=lambda key: key[0] != module)
        yield from [key for key in (*own, *methods) if key in takers][:1]


def test_the_whole_run_is_handed_to_few():
    """From one rank's part in a run on, depth first: the walk of the run's file comes back to a room that it has left
    at most 8 times. Functions take what they need."""
    known, walk, seen = takers(), [], set()

    def visit(key):
        walk.append(key[0].split(".")[1])
        if key in seen:
            return
        seen.add(key)
        for other in handed(key[0], known[key], known):
            visit(other)
            walk.append(key[0].split(".")[1])

    visit(("bigtrain.pipeline.run", "run_here"))
    stays = [name for name, _ in itertools.groupby(walk)]
    assert len(stays) > 5  # it does walk
    climbs = sum(name in stays[:number] for number, name in enumerate(stays))
    assert climbs <= 8, stays
    few = [key for key in known if not key[1].endswith(".check")]  # a component's, of its own keys
    assert len(few) <= NUM_TAKERS, sorted(few)


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
