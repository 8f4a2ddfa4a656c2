"""Does a build that is killed anywhere always end where an undisturbed one ends?

    python benchmarks/kill_test.py [--kills 100] [--seed 0] [--workers 2] [--round N]

Builds a small corpus once undisturbed. Then, round after round, builds it anew as a process in a session of its own and
kills the whole process group with ``SIGKILL`` at a uniformly random moment of the undisturbed duration, once or several
times in a row, before a last build may finish. That one has to exit 0, and the database to be the undisturbed one:
every table byte for byte, the same shards and stages in the manifest, a true copy of it, no file besides. What a
receipt or the manifest recorded at a kill must be the same file afterwards (inode and time): only shards in hand are
made again, one a worker.

Each build takes one worker or ``--workers``, as the seed says; with one, every stage runs in the driver itself. A round
depends on the seed and its own number alone, so that ``--round`` repeats one; only the machine's timing differs.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support import command, digests, make_tiny_encoder, manifest_of, near_duplicates_of, strays, write_jsonl

from retrodb.corpus.quickstart import quickstart_lines
from retrodb.manifest import MANIFEST_COPY, MANIFEST_NAME

TABLES = ("documents", "quarantine", "duplicates", "chunks", "embeddings", "index", "neighbours", "training", "leakage")
STAGES = ("corpus", "dedup", "chunk", "embed", "index", "neighbours", "training", "report")
BEFORE, AFTER = "start", "end"
"""Kills before the build held the lock, and after the last stage was recorded."""

SMALL = ("--shard-bytes", "2KiB", "--precision", "fp32", "--chunk-tokens", 8, "--sequence-tokens", 64)
FLAGS = (*SMALL, "--dedup", "drop")
"""Some ten shards a table, and chunks enough for the embed stage to take worker processes."""

KILLS_IN_A_ROW = (1, 1, 1, 2, 3, 5)
VERIFY_EVERY = 10
SECONDS_TO_END = 600

Stamp = tuple[int, int]


# -- one build as a process -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """The inputs of every build."""

    source: Path
    encoder: Path

    @staticmethod
    def make(folder: Path) -> "Corpus":
        """Twenty short topics, two near-duplicates (which are dropped), a blank and a torn record."""
        topics = [line for line in quickstart_lines() if len(line) < 3_000][:20]
        lines = [
            *topics[:7],
            '{"id": "blank", "text": " "}',
            '{"id": "torn',
            *topics[7:],
            *near_duplicates_of(topics[:2]),
        ]
        return Corpus(write_jsonl(folder / "in.jsonl", lines), make_tiny_encoder(folder / "encoder"))

    def build(self, out: Path, workers: int, *more: object) -> list[str]:
        return command(
            "build", self.source, "--out", out, "--encoder", self.encoder, "--workers", workers, *FLAGS, *more
        )


@contextmanager
def started(arguments: list[str], log: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """A process in a session of its own, of which nothing is alive afterwards."""
    with log.open("wb") as said:
        process = subprocess.Popen(arguments, stdout=said, stderr=said, start_new_session=True)
    try:
        yield process
    finally:
        kill_group(process)


def kill_group(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def session_of(leader: int) -> list[int]:
    """Living processes of a session: also one that left the process group."""
    living = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if os.getsid(process.pid) == leader and process.info["status"] != psutil.STATUS_ZOMBIE:
                living.append(process.pid)
        except (ProcessLookupError, PermissionError):
            continue
    return living


def outlives(leader: int, seconds: float = 15) -> list[int]:
    """Processes of a killed session that are still there after a while."""
    end = time.monotonic() + seconds
    while (left := session_of(leader)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def run(arguments: list[str], log: Path) -> int:
    with started(arguments, log) as process:
        return process.wait(SECONDS_TO_END)


# -- what is on disk at a kill ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """A database as a kill left it. ``kept`` are files that must never be made again; ``loose`` those not recorded."""

    stage: str
    kept: dict[str, Stamp]
    documents: dict[str, Stamp]
    """Those that the corpus stage, still under way, has a receipt for: the chunk stage writes them once more."""
    loose: dict[str, Stamp]

    def in_hand(self, earlier: "Scene | None") -> set[str]:
        """Shards that were begun and not recorded since an earlier kill, by number."""
        old = earlier.loose if earlier else {}
        names = {name for name, stamp in self.loose.items() if old.get(name) != stamp}
        return {found.group() if (found := re.search(r"\d{5}|quantiser", Path(name).name)) else name for name in names}


NOTHING = Scene(BEFORE, {}, {}, {})


def stamp_of(path: Path) -> Stamp | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def look(database: Path, builder: int) -> Scene:
    """What the process ``builder`` left: the lock names it only if it came that far."""
    try:
        manifest = manifest_of(database)
    except FileNotFoundError:
        return NOTHING
    entries: list[tuple[str, str, dict[str, Any]]] = [
        ("manifest", table, shard) for table, held in manifest["tables"].items() for shard in held["shards"]
    ]
    for receipt in sorted(database.glob(".build/*/[0-9-]*.json")):
        shards = json.loads(receipt.read_text(encoding="utf-8"))["shards"]
        entries += [(receipt.parent.name.rsplit("-", 1)[0], table, shard) for table, shard in shards.items()]
    kept, documents, known = {}, {}, {}
    for stage, table, shard in entries:
        path = shard["path"]
        stamp = stamp_of(database / path)
        if stamp is None or (database / path).stat().st_size != shard["bytes"]:
            continue
        known[path] = stamp
        if table != "documents" or stage == "chunk" or "chunk" in manifest["stages"]:
            kept[path] = stamp
        elif stage == "corpus":
            documents[path] = stamp
    files = [path for table in TABLES for path in sorted((database / table).glob("*"))]
    loose = {
        name: stamp
        for path in files
        if (name := str(path.relative_to(database))) not in known and (stamp := stamp_of(path)) is not None
    }
    missing = [stage for stage in STAGES if stage not in manifest["stages"]]
    at_work = lock_holder(database) == builder
    stage = AFTER if not missing else missing[0] if at_work else BEFORE
    return Scene(stage, kept, documents, loose)


def lock_holder(database: Path) -> int | None:
    try:
        return json.loads((database / ".lock").read_text(encoding="utf-8"))["pid"]
    except (FileNotFoundError, ValueError):
        return None


def made_again(database: Path, files: dict[str, Stamp]) -> list[str]:
    return [path for path, stamp in files.items() if stamp_of(database / path) != stamp]


# -- rounds -----------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of all kills. ``in_hand``: shards that one kill cost, at most; ``recorded``: files made again."""

    stages: Counter[str] = field(default_factory=Counter)
    survived: int = 0
    databases: int = 0
    verified: int = 0
    in_hand: int = 0
    recorded: int = 0
    violations: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.stages.total()


@dataclass
class Round:
    """One database: killed a few times, then finished and compared."""

    name: str
    folder: Path
    corpus: Corpus
    expected: Path
    seconds: dict[int, float]
    tally: Tally
    wrong: list[str] = field(default_factory=list)
    story: list[str] = field(default_factory=list)

    @property
    def database(self) -> Path:
        return self.folder / "db"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def play(self, chance: random.Random, most: int, verify: bool) -> None:
        """Kill up to ``most`` times, then finish."""
        scene, kills = NOTHING, 0
        for _ in range(min(most, chance.choice(KILLS_IN_A_ROW))):
            workers = chance.choice(sorted(self.seconds))
            after = self.kill(workers, chance.uniform(0, self.seconds[workers]), scene)
            if after is None:
                break  # it had finished: the last build below has nothing to do
            scene, kills = after, kills + 1
        self.finish(chance.choice(sorted(self.seconds)), scene)
        if verify and not self.wrong:
            self.tally.verified += 1
            if run(command("verify", self.database), self.log) != 0:
                self.wrong.append(f"verify: {self.said()}")
        self.tally.databases += 1
        self.tally.survived += 0 if self.wrong else kills

    def kill(self, workers: int, moment: float, before: Scene) -> Scene | None:
        """Start a build and kill it; None if it was faster. Judges what it did since the scene before."""
        with started(self.corpus.build(self.database, workers), self.log) as process:
            try:
                code = process.wait(moment)
            except subprocess.TimeoutExpired:
                kill_group(process)
                code = process.returncode
        if left := outlives(process.pid):
            self.wrong.append(f"processes {left} outlived the kill of their group")
        scene = look(self.database, process.pid)
        self.judge(before, scene)
        if code != -signal.SIGKILL:
            if code != 0:
                self.wrong.append(f"a build that was not killed yet exited with {code}: {self.said()}")
            return None
        self.tally.stages[scene.stage] += 1
        self.story.append(f"{moment:.2f} s, {workers} workers, {scene.stage}")
        in_hand = scene.in_hand(before)
        self.tally.in_hand = max(self.tally.in_hand, len(in_hand))
        if len(in_hand) > workers:
            self.wrong.append(f"{workers} workers had {len(in_hand)} shards in hand: {sorted(in_hand)}")
        return scene

    def judge(self, before: Scene, after: Scene | None = None) -> None:
        """What was recorded before is the same file now; and the corpus stage's documents until the next stage."""
        again = made_again(self.database, before.kept)
        if after is not None and after.stage == "corpus":
            again += made_again(self.database, before.documents)
        self.refuse_again(again)

    def refuse_again(self, again: list[str]) -> None:
        self.tally.recorded += len(again)
        if again:
            self.wrong.append(f"made again though recorded at the kill: {again}")

    def finish(self, workers: int, scene: Scene) -> None:
        """Let the next build end, and compare."""
        if scene.documents:  # to be seen before the chunk stage writes them once more
            if run(self.corpus.build(self.database, workers, "--until", "corpus"), self.log) != 0:
                self.wrong.append(f"the build after it failed: {self.said()}")
            else:
                self.refuse_again(made_again(self.database, scene.documents))
        if (code := run(self.corpus.build(self.database, workers), self.log)) != 0:
            self.wrong.append(f"the build after it exited with {code}: {self.said()}")
            return
        self.judge(scene)
        found, wanted = digests(self.database, TABLES), digests(self.expected, TABLES)
        if differ := sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name)):
            self.wrong.append(f"not as undisturbed: {differ}")
        for part in ("tables", "stages"):
            if manifest_of(self.database)[part] != manifest_of(self.expected)[part]:
                self.wrong.append(f"the manifest's {part} are not as undisturbed")
        if (self.database / MANIFEST_COPY).read_bytes() != (self.database / MANIFEST_NAME).read_bytes():
            self.wrong.append(f"{MANIFEST_COPY} is not a copy of the manifest")
        if left := strays(self.database):
            self.wrong.append(f"left behind: {left}")

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace").strip()[-2_000:]


def undisturbed(corpus: Corpus, folder: Path, workers: list[int]) -> tuple[Path, dict[int, float]]:
    """The database to compare with, and how long a build takes by number of workers."""
    seconds = {}
    run(corpus.build(folder / "warm", 1, "--until", "corpus"), folder / "log")  # whose start reads libraries from disk
    for number in workers:
        out = folder / f"undisturbed-{number}"
        begun = time.monotonic()
        if run(corpus.build(out, number), folder / "log") != 0:
            raise SystemExit(f"the undisturbed build failed:\n{(folder / 'log').read_text(encoding='utf-8')}")
        seconds[number] = time.monotonic() - begun
    first, *others = (folder / f"undisturbed-{number}" for number in workers)
    if any(digests(other, TABLES) != digests(first, TABLES) for other in others):
        raise SystemExit(f"undisturbed builds with {workers} workers differ: see {folder}")
    return first, seconds


def play_all(folder: Path, kills: int, seed: int, workers: list[int], only: int | None) -> Tally:
    corpus = Corpus.make(folder)
    expected, seconds = undisturbed(corpus, folder, workers)
    took = ", ".join(f"{value:.1f} s with {number}" for number, value in seconds.items())
    print(f"undisturbed: {took} workers; {sum(1 for _ in expected.rglob('*.*'))} files", flush=True)
    tally, began, told, number = Tally(), time.monotonic(), 0, 0 if only is None else only
    while tally.kills < kills:
        place = folder / f"round-{number}"
        place.mkdir()
        current = Round(f"seed {seed}, round {number}", place, corpus, expected, seconds, tally)
        verify = tally.kills // VERIFY_EVERY >= tally.verified
        current.play(random.Random(f"{seed}/{number}"), kills - tally.kills, verify)
        for what in current.wrong:
            tally.violations.append(f"{current.name} (killed after {'; '.join(current.story) or 'nothing'}): {what}")
            print(tally.violations[-1], file=sys.stderr, flush=True)
        if not current.wrong:
            shutil.rmtree(place)
        if tally.kills // 10 > told:
            told = tally.kills // 10
            print(f"{tally.kills:5} kills, {tally.survived} survived, {time.monotonic() - began:.0f} s", flush=True)
        if only is not None:
            break
        number += 1
    report(tally, time.monotonic() - began)
    return tally


def report(tally: Tally, seconds: float) -> None:
    print(f"\nkills      {tally.kills} in {tally.databases} databases")
    for stage in (BEFORE, *STAGES, AFTER):
        print(f"  {stage:<10} {tally.stages[stage]:5}")
    print(f"survived   {tally.survived}")
    print(f"redone     {tally.in_hand} shards in hand at most after a kill; {tally.recorded} files recorded before one")
    print(f"verified   {tally.verified} databases")
    print(f"seconds    {seconds:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="the most worker processes of a build")
    parser.add_argument("--round", type=int, help="only this round of the seed, to repeat it")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no build outlives this
    folder = Path(tempfile.mkdtemp(prefix="retrodb-kill-test-"))
    tally = None
    try:
        tally = play_all(folder, given.kills, given.seed, sorted({1, given.workers}), given.round)
    finally:
        if tally is None or not tally.violations:
            shutil.rmtree(folder, ignore_errors=True)
    if tally.violations:
        print(f"\n{len(tally.violations)} violations; the databases are in {folder}", file=sys.stderr)
        for what in tally.violations:
            print(f"  {what}", file=sys.stderr)
        print("repeat one with --seed S --round N", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
