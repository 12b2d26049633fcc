"""A disk that is full at every possible moment, one that is read-only, and a limit on the size of files.

Each case mounts a small tmpfs of its own (skipped where mounting is not permitted). The commands run in this process;
room is made by a remount, then the same command has to leave the bytes of a run on a roomy disk.
"""

import contextlib
import gc
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from command import Prefkit
from tiny import snapshot, text_rows, tiny_llama, write_rows

PAGE = os.sysconf("SC_PAGE_SIZE")
ROOMY = 256 * 2**20
DATASET = "disk/dataset"
NEXT = "make room and type the same command"
COMMANDS = {
    "build": ("build", "pipeline.yaml"),
    "audit": ("audit", DATASET),
    "precompute": ("precompute", DATASET),
    "train": ("train", DATASET),
}
BEFORE: dict[str, list[str]] = {
    "build": [],
    "audit": ["build"],
    "precompute": ["build"],
    "train": ["build", "audit", "precompute"],
}


class Disk:
    """A tmpfs whose free room a test decides."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={ROOMY}", "tmpfs", str(folder)], capture_output=True, check=False
        )
        self.mounted = done.returncode == 0
        if self.mounted:
            (folder / "ballast").write_bytes(b"x")  # a tmpfs of size 0 would be one without a limit

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True, capture_output=True)

    def leave(self, pages: int) -> None:
        """Leave room for so many pages (a tmpfs file takes whole pages)."""
        there = os.statvfs(self.folder)
        self.remount(f"size={(there.f_blocks - there.f_bfree) * there.f_frsize + pages * PAGE}")
        assert os.statvfs(self.folder).f_bavail * there.f_frsize == pages * PAGE

    def leave_names(self, number: int) -> None:
        """Leave room for so many new files and folders."""
        there = os.statvfs(self.folder)
        self.remount(f"nr_inodes={there.f_files - there.f_ffree + number}")

    def make_room(self) -> None:
        self.remount(f"size={ROOMY},nr_inodes=100000")

    def empty(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)

    def unmount(self) -> None:
        if self.mounted:
            with contextlib.suppress(subprocess.CalledProcessError):
                self.remount("rw")
            plain = subprocess.run(["umount", str(self.folder)], capture_output=True, check=False)
            if plain.returncode:
                subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    try:
        if not made.mounted:
            pytest.skip("mounting is not permitted here")
        yield made
    finally:
        made.unmount()


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., None]:
    """Two sources and a pipeline of small numbers, so that a page is a large part of every file."""
    write_rows(tmp_path / "pairs.jsonl", text_rows(60))
    write_rows(tmp_path / "more.jsonl", text_rows(60, seed=1))

    def write(*sources: str, **sections: Any) -> None:
        precompute = {"model": "model", "max_length": 128, "min_completion_tokens": 4, "max_batch_tokens": 100}
        train: dict[str, Any] = {
            "learning_rate": 1e-3,
            "batch_size": 4,
            "max_steps": 5,
            "save_steps": 2,
            "eval_steps": 3,
        }
        pipeline = {
            "dataset": DATASET,
            "kind": "text",
            "sources": [{"path": path, "format": "pairs"} for path in sources],
            "split": {"test_share": 0.1},
            "precompute": precompute,
            "train": train | sections.get("train", {}),
        }
        (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline), encoding="utf-8")

    write("pairs.jsonl", "more.jsonl")
    return write


@pytest.fixture
def model(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_llama(tmp_path / "model", template=None, **sizes)


def tables(folder: Path) -> dict[str, bytes]:
    """All files but the locks."""
    return {name: data for name, data in snapshot(folder).items() if Path(name).name != ".lock"}


def half_written(dataset: Path) -> list[str]:
    """Files beside their place that were not removed, and files in their place that are torn."""
    found = [f"left behind: {path}" for path in dataset.rglob(".*.tmp")]
    for path in dataset.rglob("*.parquet"):
        try:
            pl.read_parquet(path, glob=False)
        except (pl.exceptions.PolarsError, OSError) as error:
            found.append(f"torn: {path}: {error}")
    for path in dataset.rglob("*.json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            found.append(f"torn: {path}: {error}")
    return found


def different(left: dict[str, bytes], right: dict[str, bytes]) -> list[str]:
    return sorted(name for name in {*left, *right} if left.get(name) != right.get(name))


def refill(disk: Disk, start: Path) -> None:
    gc.collect()  # what an earlier command has mapped of deleted files would become room in the middle of the next one
    disk.make_room()
    disk.empty()
    for path in start.iterdir():
        if path.is_dir():
            shutil.copytree(path, disk.folder / path.name)


def scan(
    prefkit: Prefkit,
    disk: Disk,
    command: tuple[str, ...],
    limit: Callable[[int], Any],
    amounts: Iterator[int],
    read: Callable[[], None],
    *,
    said: str = "the disk is full",
) -> list[str]:
    """Run a command with more and more room until it succeeds; after each failure make room and run it again.

    Returns:
        where each failure was, by the error object.
    """
    start = disk.folder.parent / "start"
    shutil.copytree(disk.folder, start)
    before = tables(disk.folder)
    assert prefkit(*command).code == 0
    unbroken, places = tables(disk.folder), []
    problems: list[str] = []  # of all amounts: one that fails early must not hide the others
    for amount in amounts:
        refill(disk, start)
        assert tables(disk.folder) == before
        limit(amount)
        ended = prefkit(*command, "--json")
        if ended.code == 0:
            assert different(tables(disk.folder), unbroken) == []
            break
        error = ended.error()
        here = []
        if (ended.code, error["kind"]) != (3, "MachineError"):
            here.append(f"exit {ended.code}: {error['message']}")
        else:
            tolds = (ended.err, f"{error['message']} {error.get('hint', '')}")
            here += [f"{text!r} is not in {told!r}" for told in tolds for text in (said, NEXT) if text not in told]
        here += half_written(disk.folder)
        read()
        disk.make_room()
        again = prefkit(*command)
        here += [f"with room: exit {again.code}: {again.err}"] if again.code else []
        here += [f"differs at the end: {name}" for name in different(tables(disk.folder), unbroken)]
        places.append(error.get("where") or error["message"])
        problems += [f"{amount} ({places[-1]}): {problem}" for problem in here]
    else:
        raise AssertionError("there never was enough room")
    assert problems == [], "\n".join(problems)
    return places


def nothing_yet(prefkit: Prefkit) -> None:
    """What a reader sees of a first build that failed."""
    for words in (("info", DATASET), ("query", DATASET, "select count(*) from pairs", "--format", "csv")):
        ended = prefkit(*words)
        assert ended.code == 2, ended
        assert any(text in ended.err for text in ("unfinished", "no such dataset", "neither a dataset nor a run"))


def rows(prefkit: Prefkit, view: str) -> int:
    ended = prefkit("query", DATASET, f"select count(*) as n from {view}", "--format", "csv")
    assert ended.code == 0, ended
    return int(ended.out.splitlines()[1])


def named(places: list[str], *names: str) -> list[str]:
    """Those of the names at which no failure was: empty if each had one."""
    return [name for name in names if not any(name in place for place in places)]


# full


@pytest.mark.slow
def test_a_build_on_a_disk_that_is_full_at_any_page_ends_with_3_and_goes_on_when_there_is_room(
    prefkit: Prefkit, disk: Disk, settings: Any
) -> None:
    places = scan(prefkit, disk, COMMANDS["build"], disk.leave, iter(range(400)), lambda: nothing_yet(prefkit))
    assert named(places, ".drafts", "pairs/part", "manifest.json") == []


@pytest.mark.slow
def test_a_build_without_room_for_another_name_ends_with_3_and_goes_on_when_there_is(
    prefkit: Prefkit, disk: Disk, settings: Any
) -> None:
    places = scan(prefkit, disk, COMMANDS["build"], disk.leave_names, iter(range(400)), lambda: nothing_yet(prefkit))
    assert len(places) > 10


@pytest.mark.slow
def test_a_build_of_changed_sources_on_a_full_disk_leaves_the_old_dataset_or_says_unfinished(
    prefkit: Prefkit, disk: Disk, settings: Any
) -> None:
    settings("pairs.jsonl")
    assert prefkit(*COMMANDS["build"]).code == 0
    old = tables(disk.folder)
    settings("pairs.jsonl", "more.jsonl")

    def read() -> None:
        ended = prefkit("info", DATASET, "--json")
        if ended.code == 0:
            assert json.loads(ended.out.splitlines()[-1])["counts"]["pairs"] == 60
            assert rows(prefkit, "pairs") == 60
            left = tables(disk.folder)
            assert {name: left.get(name) for name in old} == old
        else:
            assert "unfinished" in ended.err

    places = scan(prefkit, disk, COMMANDS["build"], disk.leave, iter(range(400)), read)
    assert named(places, ".drafts", "pairs/part", "manifest.json") == []


def test_a_full_disk_does_not_keep_anybody_from_checking_or_from_hearing_that_a_build_is_up_to_date(
    prefkit: Prefkit, disk: Disk, settings: Any
) -> None:
    assert prefkit(*COMMANDS["build"]).code == 0
    before = tables(disk.folder)
    disk.leave(0)
    assert prefkit(*COMMANDS["build"], "--check").code == 0
    assert "up to date" in prefkit(*COMMANDS["build"]).out
    assert rows(prefkit, "pairs") == 120
    assert tables(disk.folder) == before


@pytest.mark.slow
def test_an_audit_on_a_full_disk_ends_with_3_and_goes_on_when_there_is_room(
    prefkit: Prefkit, disk: Disk, settings: Any
) -> None:
    assert prefkit(*COMMANDS["build"]).code == 0

    def read() -> None:
        ended = prefkit("info", DATASET, "--json")
        assert (ended.code, json.loads(ended.out.splitlines()[-1])["audit"]) in ((0, None), (0, "fail"))
        assert rows(prefkit, "tokens") >= 0

    places = scan(prefkit, disk, COMMANDS["audit"], disk.leave, iter(range(100)), read)
    assert named(places, "audit/tokens.parquet", "audit/audit.json", "views.sql") == []


@pytest.mark.slow
def test_precompute_on_a_disk_that_is_full_at_any_page_ends_with_3_and_goes_on_when_there_is_room(
    prefkit: Prefkit, disk: Disk, settings: Any, model: Path
) -> None:
    assert prefkit(*COMMANDS["build"]).code == 0

    def read() -> None:
        ended = prefkit("info", DATASET, "--json")
        references = json.loads(ended.out.splitlines()[-1])["references"]
        assert [reference["pairs"] for reference in references] in ([], [120])
        assert rows(prefkit, "reference") == sum(reference["pairs"] for reference in references)

    places = scan(prefkit, disk, COMMANDS["precompute"], disk.leave, iter(range(200)), read)
    parts = ("dropped.parquet", "plan.parquet", "part-00000.parquet", "part-00001.parquet", "views.sql")
    assert named(places, *parts) == []


@pytest.mark.slow
def test_training_on_a_disk_that_is_full_at_any_page_ends_with_3_and_goes_on_when_there_is_room(
    prefkit: Prefkit, disk: Disk, settings: Any, model: Path
) -> None:
    for command in BEFORE["train"]:
        assert prefkit(*COMMANDS[command]).code == 0

    def read() -> None:
        ended = prefkit("info", DATASET, "--json")
        assert ended.code == 0
        assert all(not run["finished"] for run in json.loads(ended.out.splitlines()[-1])["runs"])
        assert rows(prefkit, "pairs") == 120
        assert rows(prefkit, "steps") in (0, 2, 4, 6)
        assert rows(prefkit, "pair_dynamics") >= 0

    places = scan(prefkit, disk, COMMANDS["train"], disk.leave, iter(range(400)), read)
    assert named(places, "run.json", "steps.parquet", "pair_dynamics", "checkpoints/step-000002", "/model") == []
    assert not any("while writing" in place for place in places), places  # the folder is named


@pytest.mark.slow
def test_training_without_checkpoints_ends_with_3_where_the_final_model_finds_no_room_and_goes_on(
    prefkit: Prefkit, disk: Disk, settings: Any, model: Path
) -> None:
    settings("pairs.jsonl", "more.jsonl", train={"save_steps": None})
    for command in BEFORE["train"]:
        assert prefkit(*COMMANDS[command]).code == 0
    places = scan(prefkit, disk, COMMANDS["train"], disk.leave, iter(range(0, 200, 4)), lambda: None)
    assert named(places, "/model") == []


@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
def test_a_result_that_finds_no_room_ends_with_3_and_leaves_the_file_that_was_there(
    form: str, prefkit: Prefkit, disk: Disk, settings: Any
) -> None:
    settings("pairs.jsonl")
    assert prefkit(*COMMANDS["build"]).code == 0
    out = f"disk/result.{form}"
    words = ("query", DATASET, "select range as n, hash(range) as h from range(20000)", "--format", form, "--out", out)
    (disk.folder / f"result.{form}").write_text("old")
    for pages in (0, 1, 5):
        disk.leave(pages)
        ended = prefkit(*words)
        assert ended.code == 3, ended
        assert f"{out}: the disk is full" in ended.err
        assert NEXT in ended.err
        assert (disk.folder / f"result.{form}").read_text() == "old"
        assert sorted(path.name for path in disk.folder.iterdir()) == ["ballast", "dataset", f"result.{form}"]
    disk.make_room()
    assert prefkit(*words).code == 0
    assert prefkit(*words[:-1], f"elsewhere.{form}").code == 0
    assert (disk.folder / f"result.{form}").read_bytes() == (disk.folder.parent / f"elsewhere.{form}").read_bytes()


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["query", DATASET, "from pairs", "--format", "csv"], ["info", DATASET, "--json"]])
def test_what_finds_no_room_on_stdout_ends_with_3_and_a_message(
    words: list[str], unbuffered: str, prefkit: Prefkit, disk: Disk, settings: Any
) -> None:
    assert prefkit(*COMMANDS["build"]).code == 0
    there = disk.folder / "there.txt"
    there.write_bytes(b"x" * (PAGE - 100))
    disk.leave(0)
    with there.open("ab") as out:  # 100 bytes are free
        done = subprocess.run(
            [sys.executable, "-m", "prefkit", *words],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            cwd=disk.folder.parent,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},  # 1 in many container images: then a write may be short
            check=False,
        )
    assert done.returncode == 3, done
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr


# a limit on the size of files


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("command", ["build", "audit", "precompute", pytest.param("train", marks=pytest.mark.slow)])
def test_a_limit_on_the_size_of_files_ends_with_3_and_the_same_command_goes_on_without_it(
    command: str, prefkit: Prefkit, tmp_path: Path, settings: Any, model: Path
) -> None:
    (tmp_path / "disk").mkdir()
    for earlier in BEFORE[command]:
        assert prefkit(*COMMANDS[earlier]).code == 0
    dataset, start = tmp_path / DATASET, tmp_path / "start"
    if dataset.exists():
        shutil.copytree(dataset, start)
    assert prefkit(*COMMANDS[command]).code == 0
    unbroken, codes, problems = tables(dataset), [], []
    for size in (0, 100, 300, 600, 1200, 2400, 3600, 4800, 8000, 12_000, 16_000, 24_000, 64_000, 200_000, 1_000_000):
        shutil.rmtree(dataset)
        if start.exists():
            shutil.copytree(start, dataset)
        with largest_file(size):
            ended = prefkit(*COMMANDS[command], "--json")
        codes.append(ended.code)
        if ended.code == 0:
            break
        here, told = [], ended.error()["message"]
        if ended.code != 3 or "a limit on the size of files is reached (ulimit -f)" not in told:
            here.append(f"exit {ended.code}: {told}")
        here += half_written(dataset)
        assert prefkit(*COMMANDS[command]).code == 0
        here += [f"differs at the end: {name}" for name in different(tables(dataset), unbroken)]
        problems += [f"{size}: {problem}" for problem in here]
    assert problems == [], "\n".join(problems)
    assert codes[-1] == 0
    assert len(codes) > 3


def test_a_limit_on_the_size_of_files_that_the_shell_set_ends_with_3(
    prefkit: Prefkit, tmp_path: Path, settings: Any
) -> None:
    (tmp_path / "disk").mkdir()
    words = [sys.executable, "-m", "prefkit", "build", "pipeline.yaml", "--json"]
    limited = ["bash", "-c", 'ulimit -f 4; exec "$@"', "bash", *words]
    done = subprocess.run(limited, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (3, False), done.stderr
    assert "ulimit -f" in json.loads(done.stdout.splitlines()[-1])["error"]["message"]
    assert subprocess.run(words, cwd=tmp_path, capture_output=True, check=False).returncode == 0


def test_a_limit_that_the_live_log_of_a_training_reaches_ends_with_3(
    prefkit: Prefkit, tmp_path: Path, settings: Any, model: Path
) -> None:
    settings("pairs.jsonl", "more.jsonl", train={"save_steps": None})
    (tmp_path / "disk").mkdir()
    for earlier in BEFORE["train"]:
        assert prefkit(*COMMANDS[earlier]).code == 0
    with largest_file(2000):  # run.json has some 1,400 bytes, five lines of steps.jsonl more than 2,000
        ended = prefkit(*COMMANDS["train"], "--json")
    assert (ended.code, "ulimit -f" in ended.error()["message"]) == (3, True), ended
    assert prefkit(*COMMANDS["train"]).code == 0


@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
def test_a_result_larger_than_the_limit_on_files_ends_with_3_and_leaves_nothing(
    form: str, prefkit: Prefkit, tmp_path: Path, settings: Any
) -> None:
    (tmp_path / "disk").mkdir()
    assert prefkit(*COMMANDS["build"]).code == 0
    sql = "select range as n, hash(range) as h from range(20000)"
    with largest_file(8000):
        ended = prefkit("query", DATASET, sql, "--format", form, "--out", f"result.{form}")
    assert ended.code == 3, ended
    assert f"error: result.{form}: a limit on the size of files is reached (ulimit -f)" in ended.err
    assert not list(tmp_path.glob("*result*"))


# read-only


@pytest.fixture
def finished(prefkit: Prefkit, disk: Disk, settings: Any, model: Path) -> Iterator[Path]:
    """A dataset with audit, reference and a run on a disk that is read-only by now; nothing on it may change."""
    for command in ("build", "audit", "precompute", "train"):
        assert prefkit(*COMMANDS[command]).code == 0
    disk.remount("ro")
    before = snapshot(disk.folder)
    yield disk.folder / "dataset"
    assert snapshot(disk.folder) == before


def test_a_read_only_dataset_can_be_read(prefkit: Prefkit, finished: Path) -> None:
    info = prefkit("info", DATASET, "--json")
    assert info.code == 0
    told = json.loads(info.out.splitlines()[-1])
    assert (told["counts"]["pairs"], told["audit"], len(told["references"]), len(told["runs"])) == (120, "fail", 1, 1)
    assert prefkit("info", f"{DATASET}/runs/1").code == 0
    assert [rows(prefkit, view) for view in ("pairs", "reference", "steps")] == [120, 120, 6]
    assert prefkit("precompute", DATASET, "--dry-run").code == 0


def test_a_read_only_dataset_can_be_trained_on_elsewhere(prefkit: Prefkit, finished: Path, tmp_path: Path) -> None:
    ended = prefkit("train", DATASET, "--out", "elsewhere")
    assert ended.code == 0, ended
    there = tmp_path / "elsewhere"
    assert (there / "model" / "model.safetensors").read_bytes() == (
        finished / "runs" / "1" / "model" / "model.safetensors"
    ).read_bytes()
    assert (there / "steps.parquet").read_bytes() == (finished / "runs" / "1" / "steps.parquet").read_bytes()


def test_a_build_of_unchanged_sources_into_a_read_only_dataset_is_up_to_date(prefkit: Prefkit, finished: Path) -> None:
    ended = prefkit("build", "pipeline.yaml")
    assert (ended.code, "up to date" in ended.out) == (0, True), ended
    assert prefkit("build", "pipeline.yaml", "--check").code == 0


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        (("build", "pipeline.yaml", "--set", "split.seed=5"), DATASET),
        (("build", "pipeline.yaml", "--set", "train.beta=0.5"), DATASET),
        (("build", "pipeline.yaml", "--out", "disk/another"), "disk/another"),
        (("audit", DATASET), DATASET),
        (("precompute", DATASET, "--set", "precompute.max_length=120"), DATASET),
        (("train", DATASET), f"{DATASET}/runs/2"),
        (("train", DATASET, "--out", "disk/run"), "disk/run"),
        (("query", DATASET, "from pairs", "--format", "csv", "--out", "disk/result.csv"), "disk/result.csv"),
    ],
)
def test_what_would_write_into_a_read_only_folder_ends_with_2_and_names_the_folder_and_what_to_do(
    words: tuple[str, ...], folder: str, prefkit: Prefkit, finished: Path
) -> None:
    ended = prefkit(*words)
    assert ended.code == 2, ended
    assert f"error: {folder}: cannot be written: Read-only file system" in ended.err
    assert "next: make it writable, or choose another" in ended.err


def test_precompute_of_what_is_there_already_on_a_read_only_disk_says_so_or_says_what_to_do(
    prefkit: Prefkit, finished: Path
) -> None:
    ended = prefkit("precompute", DATASET, "--json")
    assert ended.code == 0 or (ended.code == 2 and "cannot be written" in ended.error()["message"]), ended
