"""Faults of a disk, and kills: one bit flipped anywhere is found and named, and nothing that was finished is lost.

Bits are flipped in place and put back, in one database that is built once; ``RETRODB_FAULTS`` says how many. A full
disk is a real one: a small tmpfs in a mount namespace that ends with the test.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import build_here, command, digests, manifest_of, near_duplicates_of, sha256, stamps, strays, write_jsonl

import retrodb as retrodb_package
from retrodb.corpus.quickstart import quickstart_lines
from retrodb.errors import InputError, RetrodbError
from retrodb.manifest import LEAKAGE_REPORT, MANIFEST_COPY, MANIFEST_NAME, STAGES, TABLES
from retrodb.quality.verify import DAMAGE_REPORT, VerifyReport, verify_database
from retrodb.units import tables_of

pytestmark = pytest.mark.slow

OWN_TABLES = set(tables_of("chunk")) - {"deleted", "spans", "queries", "span_quarantine"}
"""What a build makes; the others have tests of their own."""
FAULTS = int(os.environ.get("RETRODB_FAULTS", "40"))


@pytest.fixture(scope="module")
def database(quickstart_corpus: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file there is: several shards a table, a quantised index, a quarantine, a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("faults")
    topics = quickstart_corpus.read_text(encoding="utf-8").splitlines()
    write_jsonl(folder / "in.jsonl", [*topics[:5], '{"id": "torn', *topics[5:], *near_duplicates_of(topics[4:6])])
    build(folder / "db", tiny_encoder)
    assert verify(folder / "db").ok
    return folder / "db"


def build(database: Path, encoder: Path) -> tuple[str, ...]:
    """Build the one database, or again what it lacks; the stages that did something."""
    settings = {"tokenizer": "train:300", "index_key": "IVF4,SQ8", "min_recall": 0.0, "sequence_tokens": 512}
    source = database.parent / "in.jsonl"
    return build_here([source], database, encoder=str(encoder), shard_bytes="16KiB", neighbours=6, **settings).done


@pytest.fixture(autouse=True)
def left_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """The one database serves all tests of this module only if each of them mends what it broke."""
    if "database" not in request.fixturenames:
        yield
        return
    database: Path = request.getfixturevalue("database")
    before = stamps(database)
    yield
    after = stamps(database)
    assert {name: digest for name, (_, digest) in after.items()} == {
        name: digest for name, (_, digest) in before.items()
    }


def verify(database: Path) -> VerifyReport:
    report = verify_database(retrodb_package.open(str(database)))
    (database / DAMAGE_REPORT).unlink(missing_ok=True)
    return report


def recorded(database: Path) -> list[str]:
    """All files but the manifest that a checksum is recorded for."""
    tables = manifest_of(database)["tables"].values()
    return [*(shard["path"] for table in tables for shard in table["shards"]), "tokenizer.json", LEAKAGE_REPORT]


# -- one bit ----------------------------------------------------------------------------------------------------------


@contextmanager
def flipped(file: Path, bit: int) -> Iterator[None]:
    """One bit of a file is the other one, for a while."""
    with file.open("r+b") as raw:
        raw.seek(bit // 8)
        byte = raw.read(1)[0]
        try:
            raw.seek(bit // 8)
            raw.write(bytes([byte ^ 1 << bit % 8]))
            raw.flush()
            yield
        finally:
            raw.seek(bit // 8)
            raw.write(bytes([byte]))


def some_bits(database: Path, number: int) -> Iterator[tuple[str, int]]:
    """Random bits of random files: of each table in turn, so that few large tables do not take them all."""
    dice = random.Random("faults")
    folders: dict[str, list[str]] = {}
    for path in recorded(database):
        folders.setdefault(path.rpartition("/")[0], []).append(path)
    assert set(folders) == {*OWN_TABLES, "", "reports"}
    for fault in range(number):
        path = dice.choice(folders[sorted(folders)[fault % len(folders)]])
        yield path, dice.randrange((database / path).stat().st_size * 8)


def test_every_single_flipped_bit_of_a_recorded_file_is_found_and_it_alone_is_named(database: Path) -> None:
    missed = []
    for path, bit in some_bits(database, FAULTS):
        with flipped(database / path, bit):
            named = verify(database).paths
        if named != [path]:
            missed.append((path, bit, named))
    assert missed == []
    assert verify(database).ok


def bits_of(file: Path, number: int) -> list[int]:
    """Random bits of one file."""
    return random.Random(file.name).sample(range(file.stat().st_size * 8), number)


def test_every_single_flipped_bit_of_the_manifest_is_found(database: Path) -> None:
    missed = []
    for bit in bits_of(database / MANIFEST_NAME, FAULTS):
        with flipped(database / MANIFEST_NAME, bit):
            try:
                found = MANIFEST_NAME in verify(database).paths
            except RetrodbError as error:  # not even opened
                found = MANIFEST_NAME in str(error)
        if not found:
            missed.append(bit)
    assert missed == []


def test_every_single_flipped_bit_of_the_manifests_copy_is_found_and_it_alone_is_named(database: Path) -> None:
    missed = []
    for bit in bits_of(database / MANIFEST_COPY, FAULTS):
        with flipped(database / MANIFEST_COPY, bit):
            named = verify(database).paths
        if named != [MANIFEST_COPY]:
            missed.append((bit, named))
    assert missed == []


@pytest.mark.parametrize("name", [MANIFEST_NAME, MANIFEST_COPY])
def test_a_build_makes_a_manifest_with_a_flipped_bit_whole_again_and_rebuilds_nothing(
    name: str, database: Path, tiny_encoder: Path
) -> None:
    before = stamps(database)
    own = range(before_config(database)) if name == MANIFEST_NAME else range(0)
    for bit in bits_of(database / name, FAULTS):
        with flipped(database / name, bit):
            try:
                assert build(database, tiny_encoder) == ()
            except InputError:  # what says it is not of this program or version is not touched
                assert bit // 8 in own
                continue
            after = stamps(database)
            assert after.pop(name)[1] == before[name][1], bit
            assert after == {path: stamp for path, stamp in before.items() if path != name}, bit


def before_config(database: Path) -> int:
    """How many bytes of the manifest say whose it is, and of which version."""
    return (database / MANIFEST_NAME).read_bytes().index(b'"config"')


# -- whole shards -----------------------------------------------------------------------------------------------------


def shortened(file: Path, other: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def missing(file: Path, other: Path) -> None:
    file.unlink()


def one_more(file: Path, other: Path) -> None:
    shutil.copy(file, file.with_stem("00999"))


def swapped(file: Path, other: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(data)


@pytest.mark.parametrize("fault", [shortened, missing, one_more, swapped], ids=lambda fault: fault.__name__)
def test_a_fault_of_a_whole_shard_is_found_in_every_table(fault: Callable[[Path, Path], None], database: Path) -> None:
    """tests/test_verify.py draws the tables at random; here each has its turn, also the index and the quarantine."""
    for table in OWN_TABLES:
        paths = [path for path in recorded(database) if path.startswith(f"{table}/")]
        file = database / paths[-1]
        other = database / paths[0]
        if fault is swapped and file == other:
            continue  # the quarantine has one shard here
        kept = {path: path.read_bytes() for path in (file, other)}
        fault(file, other)
        named = set(verify(database).paths)
        file.with_stem("00999").unlink(missing_ok=True)
        for path, data in kept.items():
            path.write_bytes(data)
        expected = {
            "one_more": {f"{table}/{file.with_stem('00999').name}"},
            "swapped": {paths[-1], paths[0]},
        }
        assert named == expected.get(fault.__name__, {paths[-1]}), table


# -- a full disk ------------------------------------------------------------------------------------------------------

UNSHARE = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
FLAGS = {"shard_bytes": "2KiB", "precision": "fp32", "chunk_tokens": 8, "sequence_tokens": 64}
"""Chunks of eight tokens are many enough for the embed stage to take worker processes."""

STORY = """
disk=$1 begun=$2 told=$3 room=$4
shift 4
mount -t tmpfs -o size=64m tmpfs "$disk" || exit 99
[ -z "$begun" ] || cp -a "$begun" "$disk/db"
used=$(df --output=used --block-size=1 "$disk" | tail -1)
[ $((used + room)) -gt 0 ] || room=4096
mount -o remount,size=$((used + room)) "$disk"
"$@" > "$told/out" 2> "$told/full"
echo $? > "$told/full.code"
cp -a "$disk/db" "$told/left"
mount -o remount,size=64m "$disk"
"$@" > "$told/out" 2> "$told/freed"
echo $? > "$told/freed.code"
cp -a "$disk/db" "$told/done"
"""
"""A build on a disk with ``room`` bytes to spare, and the same command again once there is space."""


@pytest.fixture(scope="module")
def small_disk() -> None:
    """Skips where no filesystem may be mounted."""
    try:
        tried = subprocess.run(
            [*UNSHARE, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/mnt"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare here, to mount a small disk with")
    if tried.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {tried.stderr.strip()}")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    topics = [line for line in quickstart_lines() if len(line) < 3_000][:20]
    lines = [*topics[:5], '{"id": "torn', *topics[5:], *near_duplicates_of(topics[:2])]
    return write_jsonl(tmp_path_factory.mktemp("full-source") / "in.jsonl", lines)


@pytest.fixture(scope="module")
def by_stage(source: Path, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The undisturbed database, as it is before each stage; under ``done`` the whole one."""
    folder = tmp_path_factory.mktemp("full")
    before = {}
    for stage, following in zip(STAGES, [*STAGES[1:], "done"], strict=True):
        build_here([source], folder / "db", encoder=str(tiny_encoder), until=stage, **FLAGS)
        before[following] = shutil.copytree(folder / "db", folder / following)
    return before


@dataclass(frozen=True)
class FullDisk:
    """A build that found its disk full before ``stage`` was done, with ``room`` bytes to spare."""

    stage: str
    workers: int
    room: int


@dataclass(frozen=True)
class Story:
    """What became of it: exit codes, what it said, the database it left, and the one that it made of that."""

    case: FullDisk
    codes: tuple[int, int]
    said: str
    said_at_last: str
    left: Path
    done: Path


FULL_DISKS = [
    FullDisk("corpus", 1, 0),  # not even a byte for the lock
    FullDisk("corpus", 1, 40_960),
    FullDisk("embed", 2, 32_768),  # in worker processes
    FullDisk("index", 1, 24_576),  # faiss writes through a callback
    FullDisk("neighbours", 1, 65_536),
    FullDisk("training", 1, 40_960),
]


@pytest.fixture(scope="module", params=FULL_DISKS, ids=str)
def story(
    request: pytest.FixtureRequest,
    small_disk: None,
    source: Path,
    by_stage: dict[str, Path],
    tiny_encoder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Story:
    case: FullDisk = request.param
    told = tmp_path_factory.mktemp("story")
    disk = told / "disk"
    disk.mkdir()
    flags = [word for name, value in FLAGS.items() for word in (f"--{name.replace('_', '-')}", value)]
    build = command("build", source, "--out", disk / "db", "--encoder", tiny_encoder, "--workers", case.workers, *flags)
    words = [*UNSHARE, "sh", "-c", STORY, "sh", disk, by_stage.get(case.stage, ""), told, case.room, *build]
    ran = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr
    full, freed = (int((told / f"{name}.code").read_text()) for name in ("full", "freed"))
    said, at_last = ((told / name).read_text(encoding="utf-8") for name in ("full", "freed"))
    return Story(case, (full, freed), said, at_last, told / "left", told / "done")


def test_a_full_disk_costs_nothing_that_was_finished(story: Story, by_stage: dict[str, Path]) -> None:
    assert story.codes == (1, 0), story.said + story.said_at_last
    if (story.left / MANIFEST_NAME).exists():
        assert_nothing_half(story.left)
    assert digests(story.done, TABLES) == digests(by_stage["done"], TABLES)
    assert strays(story.done) == []


def assert_nothing_half(database: Path) -> None:
    """What the manifest and the receipts record is whole; nothing temporary lies about, and no lock."""
    shards = {s["path"]: s for table in manifest_of(database)["tables"].values() for s in table["shards"]}
    for stage in STAGES:
        for receipt in database.glob(f".build/{stage}-*/*.json"):
            shards |= {s["path"]: s for s in json.loads(receipt.read_text(encoding="utf-8"))["shards"].values()}
    assert [path for path, shard in shards.items() if sha256(database / path) != shard["sha256"]] == []
    assert [path for path in database.rglob("*") if path.name.startswith((".tmp-", ".lock"))] == []


def test_a_full_disk_is_told_in_one_clear_message_with_what_to_do(story: Story) -> None:
    assert re.search("no space left on (the )?device", story.said, flags=re.IGNORECASE)
    assert re.search("run (it|the same command) again", story.said)
    assert "Traceback" not in story.said


# -- kills at random moments -------------------------------------------------------------------------------------------


def test_builds_killed_at_random_moments_end_as_the_undisturbed_one() -> None:
    """What `make kill-test` does a hundred times."""
    script = Path(__file__).parents[1] / "benchmarks" / "kill_test.py"
    ran = subprocess.run([sys.executable, script, "--kills", "3"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
