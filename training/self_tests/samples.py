"""Who reads what: a sample that two ranks read, or none, changes what is learnt and shows in no metric."""

from __future__ import annotations

import itertools

from training import ranks
from training.data.dataset import Dataset
from training.data.loader import Loader
from training.data.loader_config import LoaderConfig
from training.self_tests.finding import Finding, measured
from training.self_tests.ground import Ground
from training.self_tests.pictures import SIDE, pictures

EPOCHS = 3
MEND = (
    "every rank must see the same data set and its own place: look whether the nodes share the home's storage, and"
    " at training.data.order"
)


def check(ground: Ground) -> Finding:
    """Over the ranks, each epoch holds every sample once; counted are samples missing, repeated or unreadable."""
    place = str(ranks.on_rank_zero(lambda: pictures(ground.folder)))
    dataset = ranks.on_every_rank(lambda: Dataset.open(place))  # also told here: a folder that not all nodes see
    count = len(dataset.split("train"))
    batch = ground.global_batch
    loader = Loader.open(
        dataset,
        LoaderConfig(path=place),
        resolution=SIDE,
        global_batch=batch,
        seed=0,
        rank=ground.rank,
        world=ground.world,
    )
    steps = -(-EPOCHS * count // batch)
    mine = [
        row
        for each in itertools.islice(loader.batches(0), steps)
        for row in zip(each.epochs, each.sample_ids, each.valid, strict=True)
    ]
    loader.close()
    rows = [row for told in ranks.gather(mine) for row in told]
    read = [(epoch, sample) for epoch, sample, valid in rows if valid and epoch < EPOCHS]
    wanted = {(epoch, sample) for epoch in range(EPOCHS) for sample in range(count)}
    repeated, missing = len(read) - len(set(read)), len(wanted - set(read))
    unreadable = sum(not valid for _, _, valid in rows)
    alone = len({tuple(told) for told in ranks.gather(mine)}) < ground.world
    detail = (
        f"{count} samples in {EPOCHS} epochs over {ground.world} ranks: {missing} missing, {repeated} read twice,"
        f" {unreadable} unreadable" + (", two ranks read the same rows" if alone else "")
    )
    return measured("samples", missing + repeated + unreadable, 0, detail, MEND)
