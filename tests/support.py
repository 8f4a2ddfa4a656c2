"""What tests share: real corpora, ``retrodb`` as a separate process or in this one, and an independent reader."""

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import Forked, can_fork

CORPORA = Path(os.environ.get("RETRODB_CORPORA", Path(__file__).parents[2] / "shared" / "corpora"))
DATA_TABLES = ("documents", "chunks", "embeddings", "neighbours", "training", "leakage")


def corpus(name: str) -> Path:
    """A real corpus; the test is skipped, saying so, where it is absent."""
    path = CORPORA / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"the corpus {path} is not on this machine")
    return path


# -- the command line, as a process of its own ---------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """A finished ``retrodb`` process."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out.strip().splitlines()[-1])


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "retrodb", *map(str, arguments)]


def retrodb(*arguments: object, timeout: float = 600, **environment: str) -> Ran:
    """Run the command line in a process of its own: forked, see `forked`, unless its environment forbids it."""
    whole = {**os.environ, **environment}
    if not can_fork(whole):
        done = subprocess.run(
            command(*arguments), capture_output=True, text=True, timeout=timeout, env=whole, check=False
        )
        return Ran(done.returncode, done.stdout, done.stderr)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = Forked([str(argument) for argument in arguments], whole, out, err)
        try:
            code = process.wait(timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return Ran(code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))


@dataclass
class Running:
    """A ``retrodb`` process under way, leader of a process group of its own; stderr arrives in ``said``."""

    process: "subprocess.Popen[str] | Forked"
    said: list[str] = field(default_factory=list)

    @staticmethod
    def start(*arguments: object) -> "Running":
        running = Running(Forked([str(argument) for argument in arguments], os.environ))
        running._reader = threading.Thread(target=running._read, daemon=True)
        running._reader.start()
        return running

    _reader: threading.Thread = field(init=False, repr=False)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)

    @property
    def err(self) -> str:
        return "".join(self.said)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> bool:
        """Whether ``condition`` came true while the process was running."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.01)
        assert time.monotonic() < end, f"the condition never came true; stderr so far: {self.err}"
        return False

    def signal_group(self, number: int) -> None:
        """A signal to the process and all its children, as a terminal's Ctrl-C, or the kernel's last word."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.signal_group(signal.SIGKILL)
        self.process.wait(timeout=30)

    def end(self, seconds: float = 300) -> int:
        """Its exit code, once it is over and all of stderr is here."""
        code = self.process.wait(timeout=seconds)
        self._reader.join(timeout=10)
        return code


# -- a build in this process: the driver without the seconds that starting costs ------------------------------------


@dataclass
class Progress:
    """Remembers what a build said."""

    lines: list[str] = field(default_factory=list)

    def begin(self, stage: str, total: int, done: int, unit: str) -> None:
        self.lines.append(f"begin {stage}")

    def advance(self, done: int) -> None:
        pass

    def end(self, summary: str) -> None:
        self.lines.append(summary)

    def note(self, text: str) -> None:
        self.lines.append(text)


def build_here(inputs: Iterable[object], out: Path, **settings: Any) -> Any:
    """`retrodb.pipelines.driver.build` of files, folders or globs with flags by their names; one worker by default."""
    from retrodb.pipelines.driver import build

    from retrodb.config import make_config
    from retrodb.corpus import expand_inputs, with_validation
    from retrodb.storage import Storage

    config, run = make_config({}, {"workers": 1, **settings})
    hook = threading.excepthook
    try:
        listing = with_validation(expand_inputs([str(path) for path in inputs]), config.validation)
        return build(listing.files, Storage(str(out)), config, run, Progress())
    finally:
        threading.excepthook = hook


def collected(storage: Any, **settings: Any) -> Any:
    """`retrodb.retiring.collect` by a writer of this process."""
    from retrodb.pipelines.holding import held

    from retrodb.retiring import collect

    with held(storage, Progress()) as current:
        return collect(storage, current, **settings)


def always_use_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send even the smallest stage through worker processes."""
    from retrodb.pipelines import compact, extend, report_stage, retrieval_stages, spans_stage, text_stages

    for module in (text_stages, retrieval_stages, report_stage, extend, compact, spans_stage):
        for name in vars(module):
            if name.lstrip("_").startswith("SMALL_"):
                monkeypatch.setattr(module, name, 0)


def live(database: Path, more: Path, other: Path, **settings: Any) -> list[dict[str, Any]]:
    """``add``, ``delete``, ``compact`` and ``swap`` in this process, carried out as ``settings`` say: the tables after
    each."""
    from retrodb.pipelines.add import add
    from retrodb.pipelines.compact import compact
    from retrodb.pipelines.living import delete
    from retrodb.pipelines.swap import swap

    from retrodb.config import RunSettings
    from retrodb.corpus import expand_inputs
    from retrodb.corpus.selection import Selection
    from retrodb.storage import Storage

    storage, run, tables = Storage(str(database)), RunSettings(**settings), []
    ids = table_of(database, "documents")["document_id"].to_pylist()
    for step in (
        lambda: add(storage, expand_inputs([str(more)]).files, run, Progress()),
        lambda: delete(storage, Selection(ids=(ids[0], ids[-1])), Progress()),
        lambda: compact(storage, run, Progress()),
        lambda: swap(storage, expand_inputs([str(other)]), run, Progress()),
    ):
        step()
        tables.append(manifest_of(database)["tables"])
    return tables


def make_tiny_encoder(folder: Path, seed: int = 11) -> Path:
    """A BERT of one layer and 32 dimensions with seeded random weights: vectors in no time, different for each text."""
    import torch
    from transformers import BertConfig, BertModel

    from retrodb.encoding import DEFAULT_ENCODER, resolve_encoder

    source = resolve_encoder(DEFAULT_ENCODER).folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        card = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        BertModel(card).save_pretrained(folder, safe_serialization=True)
    return folder


# -- reading a database with nothing of retrodb -----------------------------------------------------------------------


def manifest_of(database: Path) -> dict[str, Any]:
    return json.loads((database / "manifest.json").read_text(encoding="utf-8"))


def save_manifest(database: Path, manifest: Mapping[str, Any]) -> None:
    """Write a changed manifest and its copy as retrodb does: indented, with the checksum of all the rest."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    sealed = {**content, "checksum": hashlib.sha256(canonical.encode()).hexdigest()}
    text = json.dumps(sealed, indent=1, ensure_ascii=False) + "\n"
    for path in ("manifest.json", "reports/manifest.json"):
        (database / path).write_text(text, encoding="utf-8")


def shards_of(database: Path, table: str) -> list[Path]:
    """A table's files as the manifest names them."""
    return [database / shard["path"] for shard in manifest_of(database)["tables"][table]["shards"]]


def table_of(database: Path, table: str) -> pa.Table:
    """All rows of a Parquet table."""
    return pa.concat_tables([pq.read_table(path) for path in shards_of(database, table)])


def rows_of(database: Path, table: str) -> list[dict[str, Any]]:
    return table_of(database, table).to_pylist()


def vectors_of(database: Path) -> np.ndarray:
    """float16 [chunks, d]: all stored vectors, in the order of the chunks table."""
    return np.concatenate([np.load(path, allow_pickle=False) for path in shards_of(database, "embeddings")])


def traces(files: list[Path], text: str, tokens: np.ndarray, vectors: np.ndarray) -> list[str]:
    """Where something of a document is: in a column's values, or as bytes."""
    whole = [text[at : at + 60] for at in range(0, len(text) - 60, 60)]
    raw = [row.tobytes() for row in vectors] + [piece.encode() for piece in whole]
    found = []
    for path in files:
        data = path.read_bytes()
        if path.suffix == ".parquet":
            for column in pq.read_table(path).columns:
                data += b"".join(values_in(column))
        escaped = [json.dumps(piece)[1:-1].encode() for piece in whole]
        if any(piece in data for piece in [*raw, *escaped, *(row[:40].tobytes() for row in tokens)]):
            found.append(path.name)
    return found


def values_in(column: pa.ChunkedArray) -> list[bytes]:
    """The bytes of the values of a column, of lists those of their elements."""
    while pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        column = pa.chunked_array([pa.compute.list_flatten(chunk) for chunk in column.chunks], column.type.value_type)
    if pa.types.is_primitive(column.type):
        return [chunk.drop_null().to_numpy(zero_copy_only=False).tobytes() for chunk in column.chunks]
    return [value if isinstance(value, bytes) else str(value).encode() for value in column.to_pylist() if value]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(database: Path, tables: Iterable[str] = DATA_TABLES) -> dict[str, str]:
    """sha256 of every file of the given tables, by relative path: what two equal databases have in common."""
    return {
        str(path.relative_to(database)): sha256(path)
        for table in tables
        for path in sorted((database / table).glob("*"))
    }


def stamps(folder: Path) -> dict[str, tuple[int, str]]:
    """When every file below a folder was last written, and its sha256: equal only if nothing was touched."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, sha256(path)) for path in files}


def strays(database: Path) -> list[str]:
    """Files and folders of a finished database that no one recorded: there must be none."""
    recorded = {shard["path"] for table in manifest_of(database)["tables"].values() for shard in table["shards"]}
    allowed = recorded | {"manifest.json", "tokenizer.json"}
    found = [
        name
        for path in sorted(database.rglob("*"))
        if path.is_file()
        and (name := str(path.relative_to(database))) not in allowed
        and not (name.startswith("reports/") and path.suffix == ".json")
    ]
    return found + [path.name for path in database.iterdir() if path.is_dir() and path.name.startswith(".")]


def near_duplicates_of(lines: Iterable[str]) -> list[str]:
    """Records that differ from those of the given lines in their id and one word."""
    records = [json.loads(line) for line in lines]
    return [json.dumps({**r, "id": f"{r['id']}-again", "text": f"{r['text']} again"}) for r in records]


# -- writing inputs ---------------------------------------------------------------------------------------------------


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any] | str]) -> Path:
    """Records as lines; a string is a line as it stands. ``.gz`` and ``.zst`` are compressed."""
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    return write_bytes(path, "".join(line + "\n" for line in lines).encode())


def write_bytes(path: Path, data: bytes) -> Path:
    """Bytes, compressed as the name's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix in (".zst", ".zstd"):
        import zstandard

        data = zstandard.ZstdCompressor().compress(data)
    path.write_bytes(data)
    return path
