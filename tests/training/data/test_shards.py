"""Where a sample will lie is known before it is written; any reader of tars finds it there."""

import io
import tarfile

from hypothesis import given
from hypothesis import strategies as st

from training.data.shards import Packer, ShardWriter, file_name, shard_name

SIZES = st.lists(st.tuples(st.integers(0, 5000), st.integers(2, 1500)), min_size=1, max_size=30)


@given(SIZES, st.integers(1, 20_000))
def test_members_lie_where_the_packer_said(sizes: list[tuple[int, int]], shard_bytes: int) -> None:
    packer = Packer(shard_bytes)
    shards: list[io.BytesIO] = []
    writers: list[ShardWriter] = []
    expected = []
    for number, (image, fields) in enumerate(sizes):
        placed = packer.place(image, fields)
        assert placed.shard in {len(shards), len(shards) - 1}
        if placed.shard == len(shards):
            shards.append(io.BytesIO())
            writers.append(ShardWriter(shards[-1]))
        data, text = bytes([number + 1]) * image, b"{" + b" " * (fields - 2) + b"}"
        writers[-1].add(f"{number:08d}", "png", data, text)
        expected.append((placed, data, text))
    facts = [writer.close() for writer in writers]
    for placed, data, text in expected:
        content = shards[placed.shard].getvalue()
        assert content[placed.image_offset : placed.image_offset + len(data)] == data
        assert content[placed.json_offset : placed.json_offset + len(text)] == text
    for shard, fact in zip(shards, facts, strict=True):
        assert fact.size_bytes == len(shard.getvalue())
        with tarfile.open(fileobj=io.BytesIO(shard.getvalue())) as archive:
            members = archive.getmembers()
        assert len(members) % 2 == 0
        assert fact.size_bytes <= shard_bytes + tarfile.RECORDSIZE + 1024 or len(members) == 2


def test_names_of_later_generations() -> None:
    assert shard_name("train", 3) == "train-000003.tar"
    assert shard_name("train", 3, 2) == "train-000003.2.tar"
    assert file_name("train.index.npy", 1) == "train.index.1.npy"
