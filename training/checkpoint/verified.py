"""The newest whole checkpoint, looked for by all ranks together: each reads its share of the bytes."""

from __future__ import annotations

import torch.distributed as dist

from training import ranks
from training.checkpoint.stored import Checkpoint, found_in
from training.data.storage import Folder
from training.errors import CheckpointError

Found = Checkpoint | CheckpointError


def newest_together(
    folder: Folder, later_than: int = -1, candidates: list[Found] | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """As ``newest``. Every rank calls it.

    Args:
        folder: where the checkpoints lie; rank 0 looks.
        later_than: those of this step and before are of no use.
        candidates: what rank 0 has found already.

    Raises:
        StorageError: storage does not answer.
    """
    refused: list[str] = []
    if candidates is None:
        candidates = ranks.on_rank_zero(lambda: list(found_in(folder)))
    for found in candidates:
        if isinstance(found, CheckpointError):
            refused.append(str(found))
            continue
        if found.step <= later_than:
            break
        damage = _damage(found)
        if damage is None:
            return found, refused
        refused.append(damage)
    return None, refused


def _damage(found: Checkpoint) -> str | None:
    mine = sorted(found.manifest.files)[dist.get_rank() :: dist.get_world_size()]

    def look() -> str | None:
        try:
            found.check(mine)
        except CheckpointError as error:
            return str(error)
        return None

    return next((damage for damage in ranks.gather(ranks.on_every_rank(look)) if damage), None)
