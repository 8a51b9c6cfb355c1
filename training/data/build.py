"""Build a data set: judge every input, decide over all, write shards, index, ledger and manifest, make them visible."""

from __future__ import annotations

from pathlib import Path

from training.data.assembly import NothingToTrainOnError
from training.data.blocks import BLOCK_INPUTS
from training.data.config import BuildConfig
from training.data.executor import Executor, LocalExecutor
from training.data.forgotten import read_opt_outs
from training.data.manifest import Manifest
from training.data.output import contents, finished, publish, refuse_unsafe_output, settle, take_place
from training.data.progress import Progress, silent
from training.data.sources import open_source
from training.data.stages import Stages
from training.data.storage import Folder, is_remote
from training.data.workspace import opened, request_of, require_request, work_folder
from training.errors import DataError

__all__ = ["BuildConfig", "build"]


def build(
    source: str | Path,
    out: str | Path,
    config: BuildConfig,
    progress: Progress = silent,
    *,
    force: bool = False,
    executor: Executor | None = None,
    block_inputs: int = BLOCK_INPUTS,
) -> Manifest:
    """Turn a source of pictures into a data set.

    Bad inputs are dropped and named in the ledger. A picture that a manifest names in five rows, as COCO has five
    captions for each, is five samples, all in one split. The same call again finds the finished result, or goes on
    with what an earlier one had done when it was ended: that lies in ``OUT.building``. Whoever does the work, on
    however many cores, in however many tries: the files are the same, byte for byte.

    The data set becomes visible by one rename when it is complete, on remote storage by its manifest, which is
    written last; until then ``out`` is as it was.

    Args:
        source: what to read.
        out: the data set's folder.
        config: what a picture must be, how many are held out.
        progress: told how far each stage is.
        force: replace a data set that was built from something else, or that is damaged.
        executor: where blocks are judged and shards written; by default on this machine's cores.
        block_inputs: inputs that are judged together; the result does not depend on it.

    Raises:
        DataError: the source is missing or nothing of it can be kept, ``out`` holds something else or changes
            meanwhile, a picture changes meanwhile, or the disk fails.
        StorageError: storage refuses, or does not answer.
    """
    refuse_unsafe_output(source, out)
    inputs = open_source(source, config.source)
    try:
        folder = Folder.at(out if is_remote(out) else Path(out).resolve())
        settle(folder)
        before = contents(folder)
        present = finished(inputs, folder, config, progress, force=force)
        if present is not None:
            _clear_leftover(folder)
            return present
        if inputs.count() is None:
            next(iter(inputs))  # counting tells of a source that holds nothing, too
        with opened(folder) as workspace:
            request = request_of(inputs.place, config)
            again = require_request(workspace, request)
            parts, opt_outs = workspace.parts(request), read_opt_outs(folder)
            try:
                stages = Stages(
                    inputs, folder, config, workspace, parts, opt_outs, executor or LocalExecutor(), progress
                )
                manifest = stages.run(block_inputs, apart=again)
            except NothingToTrainOnError:
                workspace.clear()
                raise
            if folder.local is None:
                publish(workspace, folder, manifest)
            else:
                take_place(workspace, folder.local, before)
    except OSError as error:
        raise DataError(
            "The data set could not be written.",
            value=str(error.filename or out),
            rule=error.strerror or str(error),
            mend="make room, or see to the folder's rights; the same command again goes on where it stopped",
        ) from error
    return manifest


def _clear_leftover(out: Folder) -> None:
    """The result is there: what a killed build of another request had begun is of no use any more."""
    work = work_folder(out)
    if work.local is not None and work.local.exists():
        with opened(out) as workspace:
            workspace.clear()
