"""``darkroom data encode``: what frozen encoders make of a data set, computed once and kept."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.commands.data.executors import PLACE, AddressOption, Where, WhereOption, executor_of
from cluster.commands.data.printing import print_json, printable_path, progress_bar
from cluster.console import say, session, stderr

if TYPE_CHECKING:
    from training.config import TrainConfig
    from training.data.encode import Encoded, Job
    from training.data.executor import Executor

EXAMPLES = """Examples:

darkroom data encode data/cats --recipe smileys   (the captions, which `darkroom train smileys` would encode first)

darkroom data encode data/cats --autoencoder sdxl/vae --resolution 512 --flip

darkroom data encode data/cats --text t5/ --max-tokens 77 --dtype bf16 --workers 4

darkroom data encode s3://bucket/cats --recipe my-recipe.yaml --address http://head:8265
"""


_PLAIN_EVERY_S = 15.0
"""Without a terminal, how often a line of progress is printed."""


def encode(
    context: typer.Context,
    data: Annotated[str, typer.Argument(help="The data set's folder, a path or s3://...")],
    recipe: Annotated[
        str | None, typer.Option(help="A recipe's name or file: encode for its runs; other options change it.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="A transformers directory: keep its states of the captions.")] = None,
    autoencoder: Annotated[
        str | None, typer.Option(help="A diffusers AutoencoderKL directory: keep its latents of the pictures.")
    ] = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="Side of square pictures in pixels.")] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Keep the latents of mirrored pictures too.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of a caption; longer ones are cut.")] = None,
    dtype: Annotated[str | None, typer.Option(help="How values are kept: fp32, bf16 or fp16.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the files that are there with their checksums.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
    executor: WhereOption = Where.AUTO,
    workers: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=PLACE, help="Processes or Ray actors; here, one if not set.")
    ] = None,
    address: AddressOption = None,
) -> None:
    """Keep text states and latents beside the images, so that no run and no trial computes them again.

    Every image shard has a file of its own in DATA/encoded, in a folder that the encoder's hash, the transform and the
    type name. Whole files stay: the same command again goes on where it was interrupted.
    """
    from training.data.encode_options import Asked, jobs_of

    config = _recipe(recipe)
    jobs = jobs_of(Asked(text, max_tokens, autoencoder, resolution, flip, dtype), config)
    if address:
        raise typer.Exit(_remotely(context, address, data, config))
    from training.data.dataset import Dataset

    dataset = Dataset.open(data)
    with _saying_how_to_go_on(), _executor(context, executor, workers) as chosen:
        done = [_encode(dataset, job, chosen, workers, verify=verify, quiet=as_json) for job in jobs]
    if as_json:
        print_json({"path": data, "encoded": [_told(each) for each in done]})
        return
    for each in done:
        _report(each)


def _recipe(recipe: str | None) -> TrainConfig | None:
    from training.config import load_recipe

    return load_recipe(recipe) if recipe else None


def _remotely(context: typer.Context, address: str, data: str, config: TrainConfig | None) -> int:
    """The same command as a job on a cluster, with the recipe's file along; the job's exit code."""
    from cluster import jobs, pipeline, words
    from training.data.storage import Folder

    said = {"data": Folder.at(data).place, "recipe": jobs.RECIPE if config else None}
    for name in ("text", "autoencoder"):
        given = context.params[name]
        said[name] = str(Path(given).absolute()) if given and Path(given).exists() else given
    files = {jobs.RECIPE: pipeline.as_yaml(config)} if config else None
    return jobs.run_remotely(address, words.again(context, **said), session(context), files=files)


@contextmanager
def _executor(context: typer.Context, where: Where, workers: int | None) -> Iterator[Executor | None]:
    """Who does the work; None is this process, whose encoder uses all cores by itself."""
    with executor_of(where, workers, context) as chosen:
        from training.data.executor import LocalExecutor

        alone = isinstance(chosen, LocalExecutor) and (workers or 1) == 1
        yield None if alone else chosen


@contextmanager
def _saying_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        say("Interrupted; what was encoded is kept, and the same command goes on from there.")
        raise


def _encode(
    dataset: Any, job: Job, executor: Executor | None, workers: int | None, *, verify: bool, quiet: bool
) -> Encoded:
    from training.data.encode import encode as encode_data

    threads = max(1, len(os.sched_getaffinity(0)) // workers) if workers else 0
    with EncodeProgress(job.kind, quiet=quiet) as progress:
        return encode_data(
            dataset, job, executor=executor, threads=threads, thorough=verify, share=True, progress=progress.on_samples
        )


class EncodeProgress:
    """Follows an encoding: a bar, or a line now and then where there is no terminal.

    Args:
        kind: what is encoded.
        quiet: show nothing.
    """

    def __init__(self, kind: str, *, quiet: bool) -> None:
        self._title, self._quiet = f"Encoding {kind}", quiet
        self._bar = progress_bar(quiet=quiet or not stderr().is_terminal)
        self._task = self._bar.add_task(self._title, total=None)
        self._printed_s = time.monotonic()

    def __enter__(self) -> EncodeProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def on_samples(self, done: int, total: int) -> None:
        """Show how many samples are done."""
        self._bar.update(self._task, completed=done, total=total)
        now = time.monotonic()
        if not self._quiet and not stderr().is_terminal and now - self._printed_s > _PLAIN_EVERY_S:
            self._printed_s = now
            say(f"{self._title}: {done:,} of {total:,} samples")


def _told(done: Encoded) -> dict[str, object]:
    return {
        "kind": done.kind,
        "folders": dict(done.folders),
        "shards": done.shards,
        "made": done.made,
        "unreadable": done.unreadable,
        "removed": done.removed,
    }


def _report(done: Encoded) -> None:
    what = f"{done.made} of {done.shards} shards were encoded" if done.made else "all shards were encoded already"
    typer.echo(f"{done.kind}: {what}")
    for folder in done.folders:
        typer.echo(f"  {printable_path(folder)}")
    if done.unreadable:
        typer.echo(f"  {done.unreadable} samples could not be read; training leaves them out")
    if done.removed:
        typer.echo(f"  {done.removed} files of shards that are gone were removed")
