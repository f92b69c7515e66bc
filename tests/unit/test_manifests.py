"""Manifests that bigtrain has not written, however well their checksums fit: a sentence, no file outside is read."""

import copy
import json
from contextlib import closing

import numpy as np
import pytest
import torch
import torch.distributed as dist

from bigtrain.checkpoint import Checkpoint, Retention, save
from bigtrain.checkpoint.format import MANIFEST, SEAL
from bigtrain.config import load_config
from bigtrain.data import store as store_module
from bigtrain.data.store import FORMAT, open_store
from bigtrain.errors import CheckpointError, ConfigError, DamagedError, DataError
from bigtrain.run_folder import RunFolder
from bigtrain.state import Box
from tests.support import small_config

ODD = (-1, 0, 1, 10**18, 1.5, True, None, "", "../x", "/etc/passwd", "a/../../x", [], [10**9, 10**9], {}, "load")
SHAPES = {"embed": (6, 4), "norm": (3,)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, manifest without its checksum, state) of a checkpoint of two tensors, one in two boxes."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    boxes = []
    for slot in ("weight", "exp_avg"):
        tensor = torch.arange(24.0).view(6, 4) + len(slot)
        boxes += [Box("embed", slot, (6, 4), (0, 0), tensor[:2]), Box("embed", slot, (6, 4), (2, 0), tensor[2:])]
        boxes.append(Box("norm", slot, (3,), (0,), tensor[0, :3].contiguous()))
    folder = save(tmp_path_factory.mktemp("saved"), 7, boxes, {"updates": 7}, Retention(1))
    dist.destroy_process_group()
    manifest = json.loads((folder / MANIFEST).read_bytes())
    del manifest["checksum"]
    return folder, manifest, read(folder)


def read(folder):
    with closing(Checkpoint(folder)) as checkpoint:
        checkpoint.check_fit(model_of())
        slots = {(name, slot): (0,) * len(SHAPES[name]) for name in SHAPES for slot in ("weight", "exp_avg")}
        return {key: checkpoint.read(*key, zeros, SHAPES[key[0]]) for key, zeros in slots.items()}


def model_of(**buffers):
    """A module with these parameters and persistent buffers."""
    module = torch.nn.Module()
    for name, shape in SHAPES.items():
        module.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
    for name, buffer in buffers.items():
        module.register_buffer(name, buffer)
    return module


def forge(folder, manifest):
    (folder / MANIFEST).write_bytes(SEAL.text(manifest).encode())


def places(value, at=()):
    """The path of every value within a JSON value."""
    if at:
        yield at
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in below:
        yield from places(inner, (*at, key))


def changed(value, at, new):
    """A copy with another value at a path, or without it (new is ...)."""
    value = copy.deepcopy(value)
    inner = value
    for key in at[:-1]:
        inner = inner[key]
    if new is ...:
        del inner[at[-1]]
    else:
        inner[at[-1]] = new
    return value


def test_any_odd_value_of_a_checkpoints_manifest_is_refused_or_makes_no_difference(saved):
    folder, manifest, state = saved
    refused = 0
    for at in places(manifest):
        for new in (*ODD, ...):
            forge(folder, changed(manifest, at, new))
            try:
                found = read(folder)
            except CheckpointError as error:
                assert str(folder) in str(error), (at, new)
                refused += 1
            else:
                assert all(torch.equal(found[key], tensor) for key, tensor in state.items()), (at, new)
    assert refused > 1000
    forge(folder, manifest)


@pytest.mark.parametrize(
    ("at", "new", "told"),
    [
        (("state", "embed", "weight", "shape"), [10**9, 10**9], r"its boxes have 24 elements, its shape .* has 10{18}"),
        (("state", "embed", "weight", "boxes", 0, "lengths"), [10**9, 10**9], r"lies outside the shape \[6, 4\]"),
        (("state", "embed", "weight", "boxes", 0, "begin"), 10**18, r"bytes from 10{18} on lie outside weights-00000"),
        (("state", "embed", "weight", "boxes", 0, "checksums"), [], "blocks have no checksum"),
        (("state", "embed", "weight", "boxes", 1, "file"), "../w.safetensors", r"it has no \.\./w\.safetensors"),
        (("files", "progress.json", "checksum"), ..., "it has no checksum"),
    ],
)
def test_what_is_wrong_is_said(saved, at, new, told):
    folder, manifest, _ = saved
    forge(folder, changed(manifest, at, new))
    with pytest.raises(DamagedError, match=rf"manifest\.json cannot be used: .*{told}"):
        Checkpoint(folder).read("embed", "weight", (0, 0), (6, 4))
    forge(folder, manifest)


@pytest.mark.parametrize("how", ["..", "absolute", "link"])
def test_no_file_outside_the_folder_is_read(saved, tmp_path, how):
    folder, manifest, _ = saved
    inside = folder / "weights-00000.safetensors"
    outside = tmp_path / "w.safetensors"
    outside.write_bytes(inside.read_bytes())
    name = {"..": f"../../{tmp_path.name}/w.safetensors", "absolute": str(outside), "link": "link.safetensors"}[how]
    if how == "link":
        (folder / name).symlink_to(outside)
    forged = json.loads(json.dumps(manifest).replace(inside.name, name))
    forge(folder, forged)
    with pytest.raises(DamagedError, match=r"manifest\.json cannot be used: it names .*, which is (no|a link to)"):
        read(folder)
    (folder / "link.safetensors").unlink(missing_ok=True)
    forge(folder, manifest)


def store(folder):
    """A token store of one file too few to be read, with its manifest."""
    folder.mkdir(exist_ok=True)
    for name, dtype in (("tokens.bin", np.uint16), ("documents.bin", np.int64)):
        (folder / name).write_bytes(np.arange(9, dtype=dtype).tobytes())
    files = {path.name: {"bytes": path.stat().st_size, "sha256": "0" * 64} for path in folder.glob("*.bin")}
    metadata = {"format": FORMAT, "layout": "windows", "dtype": "uint16", "source": "x", "documents_are": "all"}
    return metadata | {"tokens": 9, "files": files, "checksums": {"bytes": 0, "sha256": "0" * 64}}


@pytest.mark.parametrize(
    ("at", "new", "told"),
    [
        (("files", "../tokens.bin"), {"bytes": 1, "sha256": "x"}, r"names \.\./tokens\.bin, which is no file of its"),
        (("files", "/etc/passwd"), {"bytes": 1, "sha256": "x"}, "names /etc/passwd, which is no file of its folder"),
        (("files", "tokens.bin", "sha256"), ..., "it has no sha256"),
        (("files", "tokens.bin", "sha256"), None, r"tokens\.bin has no checksum"),
        (("files",), ..., "it has no files"),
        (("checksums", "sha256"), ..., "it has no sha256"),
    ],
)
def test_a_stores_manifest(tmp_path, at, new, told):
    metadata = store(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").write_text(store_module.SEAL.text(changed(metadata, at, new)))
    with pytest.raises(DataError, match=rf"manifest\.json cannot be used: .*{told}.*Remove the folder"):
        open_store(tmp_path / "store", 4)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"stages": {"../../x": {}}}',
        '{"stages": {"a/b": {}}}',
        '{"stages": {"a": {"steps": "9"}}}',
        '{"stages": []}',
        '{"attempts": [{}]}',
        '{"attempts": {"a": 1}}',
    ],
)
def test_a_run_json_that_is_not_bigtrains(tmp_path, text):
    folder = RunFolder(load_config(small_config(tmp_path)).folder)
    folder.path.mkdir(parents=True)
    (folder.path / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=r"run\.json is not what bigtrain has written: .*`mv "):
        folder.metadata()


def test_buffers_that_belong_to_the_state_are_in_the_checkpoint_or_it_does_not_fit(saved, tmp_path):
    folder, _, _ = saved
    with closing(Checkpoint(folder)) as checkpoint:
        checkpoint.check_fit(model_of())
        with pytest.raises(CheckpointError, match=r"step-00000007 \(buffers\) does not fit .*; missing: bias"):
            checkpoint.check_fit(model_of(bias=torch.zeros(3)))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    boxes = [Box(name, "weight", shape, (0,) * len(shape), torch.zeros(shape)) for name, shape in SHAPES.items()]
    boxes.append(Box("bias", "buffer", (3,), (0,), torch.arange(3)))
    other = save(tmp_path, 1, boxes, {"updates": 1}, Retention(1))
    dist.destroy_process_group()
    with closing(Checkpoint(other, weights_only=True)) as checkpoint:
        checkpoint.check_fit(model_of(bias=torch.zeros(3)))
        for wrong, told in (
            (model_of(), "unknown to the model: bias"),
            (model_of(bias=torch.zeros(4)), "another shape"),
        ):
            with pytest.raises(CheckpointError, match=rf"\(buffers\) does not fit the model of its run; .*{told}"):
                checkpoint.check_fit(wrong)
