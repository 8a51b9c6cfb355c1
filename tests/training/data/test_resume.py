"""A build that was ended goes on: whenever it was, whoever goes on, the files are the same byte for byte."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.training.data.ledgers import read_ledger
from tests.training.data.servers import strangers
from training.data import build as build_module
from training.data import executor as executor_module
from training.data.build import build
from training.data.config import BuildConfig
from training.data.executor import LocalExecutor
from training.data.job_worker import JobWorker
from training.data.manifest import check_files, read_manifest
from training.data.normalise import JpegStore
from training.data.progress import Step
from training.errors import DarkroomError, DataError

Encode = Callable[..., bytes]

ORIGINAL = BuildConfig(held_out=0.3)
STORED_ANEW = BuildConfig(held_out=0.3, store=JpegStore(quality=80))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, encode: Encode) -> Path:
    """Fourteen inputs of which two are dropped."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(12):
        (folder / f"{number:02d}.png").write_bytes(encode(number, size=(64, 48)))
        (folder / f"{number:02d}.txt").write_text(f"picture {number}")
    (folder / "03.png").write_bytes(b"no picture")
    (folder / "12.png").write_bytes(encode(1, size=(64, 48)))
    return folder


def _files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


KILLER = """
import json, os, signal, sys
from pathlib import Path
from training.data.build import BuildConfig, build as build_anywhere
from training.data.executor import attempt

class Here:
    # all in this process, whose every rename is counted
    def run(self, work, jobs, *, apart=False):
        return ((job, attempt(work, job)) for job in jobs)

def build(*words, **named):
    return build_anywhere(*words, executor=Here(), **named)

def child(act):
    # whether it was killed; forked from a process that has no threads
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)

def killed_at(number, *words, **named):
    # kill the build when it is about to make its file ``number`` visible, or to move a folder
    left = number
    def dying(real):
        def move(*places, **options):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*places, **options)
        return move
    os.rename, os.replace = dying(os.rename), dying(os.replace)
    build(*words, **named)

source, folder, one, other = Path(sys.argv[1]), Path(sys.argv[2]), *map(BuildConfig.model_validate_json, sys.argv[3:5])
"""


def _run(program: str, source: Path, folder: Path, one: BuildConfig, other: BuildConfig = ORIGINAL) -> list[Any]:
    """What a program that kills builds prints, from its JSON."""
    words = [source, folder, one.model_dump_json(), other.model_dump_json()]
    done = subprocess.run(
        [sys.executable, "-c", KILLER + program, *words], stdout=subprocess.PIPE, text=True, check=True, timeout=120
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("config", "stride"), [(ORIGINAL, 1), (STORED_ANEW, 3)], ids=["original", "jpeg"])
def test_a_kill_at_any_point_changes_nothing(config: BuildConfig, stride: int, source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "whole", config)
    program = (
        "number = 1\n"
        "while child(lambda: killed_at(number, source, folder / f'out {number}', one, block_inputs=4)):\n"
        "    print(json.dumps((folder / f'out {number}').exists()))\n"
        "    child(lambda: build(source, folder / f'out {number}', one, block_inputs=4))\n"
        f"    number += {stride}\n"
    )
    seen = _run(program, source, tmp_path, config)
    assert not any(seen)
    assert len(seen) > 10 // stride  # request, four parts, two shards, two notes, origin, manifest, the folder itself
    for number in range(1, stride * len(seen) + 2, stride):
        assert _files(tmp_path / f"out {number}") == _files(tmp_path / "whole")
    assert not list(tmp_path.glob("*.building"))


def test_killed_again_and_again_it_still_ends(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "whole", ORIGINAL)
    program = (
        "while child(lambda: killed_at(4, source, folder / 'out', one, block_inputs=2)):\n    print(json.dumps(None))\n"
    )
    assert len(_run(program, source, tmp_path, ORIGINAL)) > 2
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


def test_a_kill_while_the_old_data_set_is_replaced_leaves_one_of_them(source: Path, tmp_path: Path) -> None:
    build(source, tmp_path / "new", STORED_ANEW)
    build(source, tmp_path / "old", ORIGINAL)
    old, out = _files(tmp_path / "old"), tmp_path / "out"
    shutil.copytree(tmp_path / "old", out)
    program = (
        "number = 1\n"
        "def state():\n"
        "    out = folder / 'out'\n"
        "    files = {path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else None\n"
        "    return files if files is None else files == {n: (folder / 'old' / n).read_bytes() for n in files}\n"
        "while child(lambda: killed_at(number, source, folder / 'out', one, force=True, block_inputs=4)):\n"
        "    print(json.dumps(state()))\n"
        "    child(lambda: build(source, folder / 'out', other))\n"  # the old one is found, not built
        "    print(json.dumps(state()))\n"
        "    number += 1\n"
    )
    seen = _run(program, source, tmp_path, STORED_ANEW, ORIGINAL)
    assert set(seen[0::2]) == {True, None}
    assert set(seen[1::2]) == {True}
    assert old != _files(out) == _files(tmp_path / "new")


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little work goes to other processes, too."""
    monkeypatch.setattr(executor_module, "_WORTH_PROCESSES_S", 0.0001)


def test_the_number_of_workers_and_blocks_changes_nothing(source: Path, tmp_path: Path, processes: None) -> None:
    build(source, tmp_path / "one", ORIGINAL, executor=LocalExecutor(1), block_inputs=3)
    build(source, tmp_path / "two", ORIGINAL, executor=LocalExecutor(2), block_inputs=5)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
    check_files(tmp_path / "two", read_manifest(tmp_path / "two"), checksums=True)


def test_workers_leave_with_a_killed_build_and_another_number_goes_on(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from training.data import executor\n"
        "from training.data.build import BuildConfig, build\n"
        "executor._WORTH_PROCESSES_S = 0.0001\n"
        "def wait(step):\n"
        "    if step.stage == 'judge' and step.done > 4:\n"
        "        print('judged', flush=True)\n"
        "        time.sleep(600)\n"
        "build(Path(sys.argv[1]), Path(sys.argv[2]), BuildConfig(held_out=0.3), wait,\n"
        "      executor=executor.LocalExecutor(2), block_inputs=4)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", program, source, out], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    assert driver.stdout.readline() == "judged\n"
    workers = psutil.Process(driver.pid).children()
    assert len(workers) == 2
    driver.kill()
    driver.wait()
    driver.stdout.close()
    psutil.wait_procs(workers, timeout=60)
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
    steps: list[Step] = []
    build(source, out, ORIGINAL, steps.append, block_inputs=4)
    assert max(step.found for step in steps) >= 8
    build(source, tmp_path / "whole", ORIGINAL)
    assert _files(out) == _files(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with little room; ``mount -o remount`` gives it more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_clear_error_and_the_same_command_goes_on(
    source: Path, tmp_path: Path, small_disk: Path
) -> None:
    out = small_disk / "out"
    with pytest.raises(DarkroomError, match="No space left on device") as refused:
        build(source, out, ORIGINAL, block_inputs=4)
    assert "the same command again" in str(refused.value)
    assert not out.exists()
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    steps: list[Step] = []
    build(source, out, ORIGINAL, steps.append, block_inputs=4)
    assert max(step.found for step in steps) > 0
    build(source, tmp_path / "whole", ORIGINAL)
    assert _files(out) == _files(tmp_path / "whole")


def test_a_picture_that_changes_under_the_build_is_judged_anew(tmp_path: Path, encode: Encode) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for number in range(8):
        (source / f"{number}.png").write_bytes(encode(number, size=(32, 32), kind="BMP"))
    before = (source / "5.png").stat()

    def change(step: Step) -> None:
        if step.stage == "decide":
            (source / "5.png").write_bytes(encode(99, size=(32, 32), kind="BMP"))
            os.utime(source / "5.png", ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(DataError, match="A picture changed while the data set was built") as refused:
        build(source, out, ORIGINAL, change, block_inputs=4)
    assert "5.png" in str(refused.value)
    steps: list[Step] = []
    build(source, out, ORIGINAL, steps.append, block_inputs=4)
    assert max(step.found for step in steps) == 4
    build(source, tmp_path / "whole", ORIGINAL)
    assert _files(out) == _files(tmp_path / "whole")


def test_a_file_that_is_added_under_the_build_is_noticed(tmp_path: Path, encode: Encode) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for number in range(8):
        (source / f"{number}.png").write_bytes(encode(number))

    def add(step: Step) -> None:
        if step.stage == "decide":
            (source / "55.png").write_bytes(encode(55))

    with pytest.raises(DataError, match="The source changed while the data set was built"):
        build(source, out, ORIGINAL, add, block_inputs=4)
    steps: list[Step] = []
    assert build(source, out, ORIGINAL, steps.append, block_inputs=4).inputs == 9
    assert max(step.found for step in steps) == 4


FATAL = '''
import os, signal
from dataclasses import dataclass

@dataclass(frozen=True)
class Fatal:
    """An input whose decoder takes the process with it."""
    name: str
    image = None
    fields = None
    def fetch(self, config):
        os.kill(os.getpid(), signal.SIGKILL)

@dataclass(frozen=True)
class Broken:
    """An input that no rule can judge."""
    name: str
    image = None
    fields = None
    def fetch(self, config):
        raise RuntimeError("a fault of ours")
'''


@pytest.fixture
def with_one(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: None) -> Callable[[str], None]:
    """Add an input of a kind to what ``build`` reads."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "fatal_inputs.py").write_text(FATAL)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    fatal = importlib.import_module("fatal_inputs")
    real = build_module.open_source

    def add(kind: str) -> None:
        class Longer:
            def __init__(self, *words: Any) -> None:
                self._source = real(*words)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._source, name)

            def __iter__(self) -> Iterator[Any]:
                for number, item in enumerate(self._source):
                    if number == 6:
                        yield getattr(fatal, kind)("bad.png")
                    yield item

        monkeypatch.setattr(build_module, "open_source", Longer)

    return add


def test_an_input_that_kills_its_process_is_dropped_and_named(
    source: Path, tmp_path: Path, with_one: Callable[[str], None]
) -> None:
    with_one("Fatal")
    manifest = build(source, tmp_path / "out", ORIGINAL, executor=LocalExecutor(2), block_inputs=4)
    rows = {row.source: row for row in read_ledger(tmp_path / "out")}
    assert len(rows) == manifest.inputs == 14
    assert (rows["bad.png"].kept, rows["bad.png"].rule) == (False, "corrupt")
    assert "the process that decoded it died" in rows["bad.png"].detail
    assert manifest.dropped == {"corrupt": 1, "exact_duplicate": 1, "undecodable": 1}


def test_an_input_that_kills_a_small_build_is_found_by_the_same_command(
    source: Path, tmp_path: Path, with_one: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    (tmp_path / "modules").mkdir(exist_ok=True)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from fatal_inputs import Fatal\n"
        "from training.data import build\n"
        "real = build.open_source\n"
        "class Longer:\n"
        "    def __init__(self, *words):\n"
        "        self.source = real(*words)\n"
        "    def __getattr__(self, name):\n"
        "        return getattr(self.source, name)\n"
        "    def __iter__(self):\n"
        "        yield from [Fatal('bad.png'), *self.source]\n"
        "build.open_source = Longer\n"
        "print(build.build(Path(sys.argv[1]), Path(sys.argv[2]), build.BuildConfig()).dropped)\n"
    )
    words = [sys.executable, "-c", program, source, tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "modules")}
    first, second = (subprocess.run(words, env=environment, capture_output=True, text=True, check=False) for _ in "12")
    assert first.returncode == -signal.SIGKILL
    assert second.stdout.strip() == "{'corrupt': 1, 'exact_duplicate': 1, 'undecodable': 1}", second.stderr


def test_a_block_that_fails_twice_is_named_and_all_others_are_done(
    source: Path, tmp_path: Path, with_one: Callable[[str], None]
) -> None:
    with_one("Broken")
    with pytest.raises(DataError, match="Parts of the build failed") as refused:
        build(source, tmp_path / "out", ORIGINAL, executor=LocalExecutor(2), block_inputs=4)
    assert "inputs 4 to 7, 04.png to 06.png: RuntimeError: a fault of ours" in str(refused.value)
    assert len(list((tmp_path / "out.building").glob("judged-*/*.parquet"))) == 3


def test_ctrl_c_at_a_terminal_reaches_no_worker() -> None:
    """One that is just starting would print what it was importing."""
    worker = JobWorker()
    with closing(worker):
        assert worker.do(os.getpgid, 0) != os.getpgid(0)


def test_ctrl_c_ends_with_130_and_says_that_the_same_command_goes_on(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = (
        "import os, signal, sys\n"
        "from training.data import stages\n"
        "real = stages.decided\n"
        "def decided(*words):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(*words)\n"
        "stages.decided = decided\n"
        "from cluster.cli import main\n"
        "main()\n"
    )
    words = ["--home", tmp_path / "home", "data", "build", source, out]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert "the same command goes on from there" in " ".join(done.stderr.split())
    assert (tmp_path / "out.building").is_dir()
    assert not out.exists()


def test_ctrl_c_does_not_wait_for_a_server_that_is_silent(tmp_path: Path, encode: Encode) -> None:
    program = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from cluster.cli import main\n"
        "main()\n"
    )
    patient = ["allow_networks=['127.0.0.2']", "read_timeout_s=60", "total_timeout_s=60", "retries=0"]
    with strangers(encode(1)) as server:
        (tmp_path / "list.txt").write_text(server.url("/silent"))
        words = ["--home", tmp_path / "home", "data", "build", tmp_path / "list.txt", tmp_path / "out"]
        words += [word for option in patient for word in ("--set", f"source.download.{option}")]
        with subprocess.Popen([sys.executable, "-c", program, *words], stderr=subprocess.PIPE, text=True) as driver:
            while not server.active and driver.poll() is None:
                time.sleep(0.01)
            driver.send_signal(signal.SIGINT)
            _, told = driver.communicate()
            assert server.active == 1  # it has not answered yet
    assert driver.returncode == 130, told
    assert "the same command goes on from there" in " ".join(told.split())
