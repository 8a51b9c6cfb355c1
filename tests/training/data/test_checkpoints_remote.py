"""Checkpoints in a bucket of a real S3 server: a manifest is the last object, and without one there is none."""

import torch

from training.checkpoint import MANIFEST, Checkpoint, CheckpointConfig, newest, save
from training.checkpoint.layout import Layout
from training.checkpoint.slab import Slab
from training.checkpoint.vault import BucketVault
from training.data.storage import Folder
from training.engine_state import Part

KEPT = CheckpointConfig(keep=2)


def keep_one(folder: Folder, step: int) -> Checkpoint:
    groups = {name: {"x": torch.arange(5000) * float(step)} for name in ("weights", "ema")}
    return save(folder, step=step, position=step * 8, groups=groups, about={"at": step}, config=KEPT)


def steps(folder: Folder) -> set[str]:
    return {name.partition("/")[0] for name in folder.names("step-")}


def test_saved_found_retained_and_swept_in_a_bucket(bucket: str) -> None:
    folder = Folder.at(bucket)
    assert newest(folder) == (None, [])
    for step in (1, 2, 3):
        saved = keep_one(folder, step)
    assert saved.path == f"{bucket}/step-00000003"
    assert steps(folder) == {"step-00000002", "step-00000003"}
    found, refused = newest(folder)
    assert found == saved
    assert refused == []
    assert torch.equal(found.load("ema")["x"], torch.arange(5000) * 3.0)
    assert torch.equal(found.source().read("weights", "x", 10, 4990), torch.arange(10, 4990) * 3.0)

    # a dead attempt has left files of a step that was never committed, and beside those of one that was
    parts = [Part("weights", "x", (3,), 0, torch.ones(3))]
    slab = Slab(Layout.of(parts)[0])
    for step in (3, 4):
        BucketVault(folder, "dead").write(step, slab, 0, 2)
    found, refused = newest(folder)
    assert found == saved
    (reason,) = refused
    assert f"{bucket}/step-00000004/{MANIFEST}" in reason
    assert "is not there" in reason
    keep_one(folder, 5)
    assert steps(folder) == {"step-00000003", "step-00000005"}
    assert not [name for name in folder.names("step-") if "/dead/" in name]
    assert newest(folder)[1] == []


def test_a_flipped_bit_in_any_object_is_named_and_the_one_before_is_taken(bucket: str) -> None:
    folder = Folder.at(bucket)
    keep_one(folder, 1)
    keep_one(folder, 2)
    for name in list(folder.names("step-00000002/")):
        content = folder.read(name)
        altered = bytearray(content)
        altered[len(altered) // 2] ^= 4
        folder.write(name, bytes(altered))
        found, refused = newest(folder)
        assert found is not None
        assert found.step == 1
        (reason,) = refused
        assert folder.url(name) in reason
        assert "altered" in reason
        folder.write(name, content)
    assert newest(folder)[1] == []
    # the run went on from step 1, and comes to step 2 again: the damaged one is replaced
    keep_one(folder, 2)
    assert newest(folder)[1] == []
