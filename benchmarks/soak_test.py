"""Does a database that lives stay true while everything that uses it may die at any moment?

    python benchmarks/soak_test.py [--minutes 10] [--between 4] [--seed 0]

One small database of blocks, and at the same time on it: a trainer (``retrodb realm``), its refresher
(``retrodb refresh --watch``), someone who adds and deletes documents and retires versions, and two readers. All of
them are killed with ``SIGKILL``, process group and all, at random moments, and started again. The readers answer
questions from the version they have open, and compare each answer with a brute force over that version's tables, read
by pyarrow and numpy alone; they keep a version open while others are published and retired, and ask it again. At the
end every kept version is verified, and no deleted document may be given to readers of the current one.

Exit codes that a killed neighbour may cause are expected (6: another writer holds the database); any other, a traceback
or a wrong answer is a violation.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from retrodb.schemas import NULL_ID
from support import command, make_tiny_encoder, manifest_of, retrodb, write_jsonl

import retrodb as package
from retrodb.corpus.quickstart import quickstart_lines
from retrodb.errors import RetrodbError

TOPICS, ADDITIONS, DIMENSION = 10, 40, 16
LOCKED: Final = 6
KILLED: Final = -int(signal.SIGKILL)
QUERIES, K = 4, 6


# -- the reader: a process of its own ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tables:
    """A version's blocks as any program may read them."""

    chunk_ids: np.ndarray
    uids: list[bytes]
    vectors: np.ndarray
    null: np.ndarray

    @staticmethod
    def read(database: Path, version: int) -> "Tables":
        path = database / "versions" / str(version) / "manifest.json"
        manifest = json.loads((path if path.exists() else database / "manifest.json").read_text(encoding="utf-8"))

        def files(table: str) -> list[Path]:
            shards = manifest["tables"].get(table, {"shards": []})["shards"]
            return [database / shard["path"] for shard in sorted(shards, key=lambda shard: shard["number"])]

        chunks = [pq.read_table(file, columns=["chunk_id", "document_id", "uid"]) for file in files("chunks")]
        gone = {id for file in files("deleted") for id in pq.read_table(file)["document_id"].to_pylist()}
        owners = np.concatenate([table["document_id"].to_numpy() for table in chunks])
        kept = ~np.isin(owners, sorted(gone))
        uids = [uid for table in chunks for uid in table["uid"].to_pylist()]
        return Tables(
            np.concatenate([table["chunk_id"].to_numpy() for table in chunks])[kept],
            [uid for uid, there in zip(uids, kept, strict=True) if there],
            np.concatenate([np.load(file) for file in files("embeddings")]).astype(np.float32)[kept],
            np.load(files("null")[0]).astype(np.float32),
        )

    def best(self, query: np.ndarray, k: int) -> tuple[list[int], np.ndarray]:
        """The k best distinct blocks by inner product: ids, and all scores."""
        scores = self.vectors @ query
        found: list[int] = []
        seen: set[bytes] = set()
        for at in np.lexsort((self.chunk_ids, -scores)):
            if self.uids[at] not in seen:
                seen.add(self.uids[at])
                found.append(at)
        return [int(at) for at in found[:k]], scores


def wrong_answers(tables: Tables, queries: np.ndarray, ids: np.ndarray, scores: np.ndarray) -> list[str]:
    """What candidates got wrong: slot 0 is the null document, the others are the best blocks."""
    wrong = []
    for row, query in enumerate(queries):
        best, every = tables.best(query, ids.shape[1] - 1)
        expected = every[best]
        own = scores[row, 1 : 1 + len(best)]
        if ids[row, 0] != NULL_ID or not np.allclose(own, expected, rtol=1e-4, atol=1e-4):
            wrong.append(f"scores {own.tolist()}, by brute force {expected.tolist()}")
            continue
        unknown = set(ids[row, 1 : 1 + len(best)].tolist()) - set(tables.chunk_ids.tolist())
        if unknown:
            wrong.append(f"blocks {sorted(unknown)} are not in this version, or deleted")
    return wrong


def read_for_ever(database: Path, seed: int) -> None:
    """One line of JSON a look: the version, how often it was asked, and what was wrong."""
    chance = np.random.default_rng(seed)
    while True:
        with package.open(str(database)) as db:
            tables = Tables.read(database, db.version)
            queries = chance.normal(size=(QUERIES, tables.vectors.shape[1]))
            queries = queries.astype(np.float16).astype(np.float32)  # as vectors are, queries too
            first = db.candidates(queries, K)
            wrong = wrong_answers(tables, queries, first.ids, first.scores)
            looks = int(chance.integers(1, 20))
            for _ in range(looks):
                time.sleep(0.1)
                again = db.candidates(queries, K)
                if not (np.array_equal(again.ids, first.ids) and np.array_equal(again.scores, first.scores)):
                    wrong.append(f"version {db.version} answers otherwise than before")
            print(json.dumps({"version": db.version, "looks": looks + 1, "wrong": wrong}), flush=True)


# -- the cast ---------------------------------------------------------------------------------------------------------


@dataclass
class Actor:
    """A process that is started again whenever it is dead. ``next`` gives its command; None: nothing to do any more."""

    name: str
    next: Callable[[], list[str] | None]
    log: Path
    done: Callable[[int], None] = lambda code: None
    fine: frozenset[int] = frozenset((0, LOCKED))
    process: "subprocess.Popen[bytes] | None" = None
    starts: int = 0

    def start(self) -> None:
        wanted = self.next()
        if wanted is None:
            return
        with self.log.open("ab") as said:
            self.process = subprocess.Popen(wanted, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        self.starts += 1

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process is not None and self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            self.process.wait(60)


@dataclass
class Soak:
    """The whole play, and what came of it."""

    folder: Path
    chance: random.Random
    between: float
    """Seconds between two kills, on average."""
    kills: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    deleted: set[str] = field(default_factory=set)
    additions: int = 0
    doing: tuple[str, Any] = ("", None)

    @property
    def database(self) -> Path:
        return self.folder / "db"

    def prepare(self) -> None:
        records = [json.loads(line) for line in quickstart_lines() if 1_500 < len(line) < 6_000]
        self.keys = [record["id"] for record in records[:TOPICS]]
        write_jsonl(self.folder / "topics.jsonl", [json.dumps(record) for record in records[:TOPICS]])
        for at in range(ADDITIONS):
            record = records[TOPICS + at % (len(records) - TOPICS)]
            again = {**record, "id": f"added-{at}", "text": f"{record['text']}\n\nAddition {at}."}
            write_jsonl(self.folder / f"added-{at}.jsonl", [json.dumps(again)])
        make_tiny_encoder(self.folder / "encoder")
        build = ["--unit", "block", "--metric", "ip", "--chunk-tokens", 64, "--shard-bytes", "16KiB", "--workers", 1]
        for arguments in (
            [
                "build",
                self.folder / "topics.jsonl",
                "--out",
                self.database,
                "--encoder",
                self.folder / "encoder",
                *build,
            ],
            ["spans", self.database, "--mask", "random-span", "--workers", 1],
        ):
            ran = retrodb(*arguments)
            if ran.code:
                raise SystemExit(ran.err)

    def cast(self) -> list[Actor]:
        exports, checkpoint = self.folder / "exports", self.folder / "checkpoint"
        start = ["--start", self.folder / "encoder", "--dimension", DIMENSION, "--cloze-steps", 2, "--batch", 2]
        train = ["realm", self.database, "--exports", exports, "--out", checkpoint, *start, "--steps", 100_000]
        follow = ["refresh", self.database, "--watch", exports, "--poll", 0.2, "--workers", 1]
        actors = [
            Actor(
                "trainer", lambda: command(*train, "--export-every", 20, "--threads", 1), self.folder / "trainer.log"
            ),
            Actor("refresher", lambda: command(*follow), self.folder / "refresher.log"),
            Actor("changer", self.change, self.folder / "changer.log", self.changed),
        ]
        for number in range(2):
            read = [sys.executable, __file__, "--read", str(self.database), "--seed", str(number)]
            actors.append(Actor(f"reader {number}", lambda read=read: read, self.folder / f"reader-{number}.log"))
        return actors

    def change(self) -> list[str] | None:
        """The next change; one that was killed is done again."""
        if self.doing[0] == "":
            what = self.chance.choice(["add", "add", "delete", "gc"])
            if what == "add" and self.additions < ADDITIONS:
                self.doing = ("add", self.additions)
            elif what == "delete" and len(self.keys) > 4:
                self.doing = ("delete", self.chance.choice(self.keys))
            else:
                self.doing = ("gc", None)
        what, of = self.doing
        if what == "add":
            return command("add", self.database, self.folder / f"added-{of}.jsonl", "--workers", 1)
        return command("delete", self.database, "--key", of) if what == "delete" else command("gc", self.database)

    def changed(self, code: int) -> None:
        what, of = self.doing
        self.ends[f"{what}: {'killed' if code == KILLED else code}"] += 1
        # What was killed after it was published is done, and no more is heard of it: an addition is refused when it is
        # done again, for its content is there, and a deletion may find the database locked.
        known = code != KILLED and self._is_published()
        if code == LOCKED and not known:
            self.doing = ("", None)  # nothing was begun: perhaps something else the next time
        elif code == 0 or known:
            self.doing = ("", None)
            if what == "add":
                self.additions += 1
                self.keys.append(f"added-{of}")
            elif what == "delete":
                self.keys.remove(of)
                self.deleted.add(of)

    def _is_published(self) -> bool:
        """Whether the current version has the change that is being made."""
        what, of = self.doing
        if what == "add":
            return any(entry["url"].endswith(f"added-{of}.jsonl") for entry in manifest_of(self.database)["inputs"])
        return what == "delete" and of not in self._keys_left()

    def _keys_left(self) -> set[str]:
        with package.open(str(self.database)) as db:
            return {str(document.key) for document in db.documents()}

    def play(self, seconds: float) -> None:
        actors = self.cast()
        end, next_kill = time.monotonic() + seconds, 0.0
        try:
            while time.monotonic() < end and not self.wrong:
                for actor in actors:
                    self.attend(actor)
                if time.monotonic() > next_kill:
                    next_kill = time.monotonic() + self.chance.uniform(0, 2 * self.between)
                    victim = self.chance.choice(actors)
                    victim.kill()
                    self.kills[victim.name] += 1
                time.sleep(0.05)
        finally:
            for actor in actors:
                actor.kill()
        self.read_logs(actors)

    def attend(self, actor: Actor) -> None:
        """Start who is dead; judge how it died."""
        if actor.process is not None:
            code = actor.process.poll()
            if code is None:
                return
            before = self.doing
            actor.done(code)
            refused_twice = before[0] == "add" and self.doing[0] == ""  # it was there already
            if code not in (*actor.fine, KILLED) and not (actor.name == "changer" and refused_twice):
                self.wrong.append(f"{actor.name} ended with {code}: {tail(actor.log)}")
        actor.start()

    def read_logs(self, actors: list[Actor]) -> None:
        for actor in actors:
            if not actor.log.exists():
                continue
            text = actor.log.read_text(encoding="utf-8", errors="replace")
            if "Traceback" in text:
                self.wrong.append(f"{actor.name} shows a traceback: {text[text.index('Traceback') :][:3_000]}")
            for line in text.splitlines():
                if line.startswith("{") and line.endswith("}") and "looks" in line:
                    look = json.loads(line)
                    self.ends["answers compared with brute force"] += QUERIES
                    self.ends["answers asked again"] += QUERIES * (look["looks"] - 1)
                    self.wrong += [f"{actor.name}, version {look['version']}: {what}" for what in look["wrong"]]

    def audit(self) -> None:
        """The database once everybody is gone: one more of each change, then every version is verified."""
        for arguments in (["gc", self.database], ["verify", self.database]):
            ran = retrodb(*arguments)
            if ran.code:
                self.wrong.append(f"{arguments[0]} ended with {ran.code}: {ran.err or ran.out}")
        manifest = manifest_of(self.database)
        self.ends["versions published"] = manifest["version"]["id"]
        for kept in manifest["versions"]:
            ran = retrodb("verify", self.database, "--version", kept["version"]["id"])
            if ran.code:
                self.wrong.append(f"verify --version {kept['version']['id']}: {ran.code}: {ran.err or ran.out}")
        left = self._keys_left()
        with package.open(str(self.database)) as db:
            try:
                tables = Tables.read(self.database, db.version)
                wanted = np.ones((1, tables.vectors.shape[1]), np.float32)
                found = db.candidates(wanted, K)
                self.wrong += wrong_answers(tables, wanted, found.ids, found.scores)
            except RetrodbError as error:
                self.wrong.append(f"the last version: {error}")
        if still := left & self.deleted:
            self.wrong.append(f"deleted documents that readers are given: {sorted(still)}")
        under_way = {self.doing[1]} if self.doing[0] == "delete" else set()  # killed with the others
        if lost := set(self.keys) - left - under_way:
            self.wrong.append(f"documents that are gone though nobody deleted them: {sorted(lost)}")


def tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace").strip()[-2_000:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--between", type=float, default=4, help="seconds between two kills, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read is not None:
        read_for_ever(given.read, given.seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nobody outlives this
    folder = Path(tempfile.mkdtemp(prefix="retrodb-soak-"))
    soak = Soak(folder, random.Random(given.seed), given.between)
    begun = time.monotonic()
    try:
        soak.prepare()
        soak.play(60 * given.minutes)
        soak.audit()
    finally:
        if not soak.wrong:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"kills      {soak.kills.total()}: " + ", ".join(f"{n} {name}" for name, n in sorted(soak.kills.items())))
    for what, n in sorted(soak.ends.items()):
        print(f"  {what:<40} {n:6,}")
    print(f"seconds    {time.monotonic() - begun:.0f}")
    if soak.wrong:
        print(f"\n{len(soak.wrong)} violations; everything is in {folder}", file=sys.stderr)
        for what in soak.wrong:
            print(f"  {what}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
