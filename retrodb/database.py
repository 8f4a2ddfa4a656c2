"""The reader over all tables: what `retrodb.open` returns.

    db = retrodb.open("my-db")
    db.summary()                          # counts, fingerprints, recall
    db.chunk(chunk_id).text               # exact source text
    db.neighbours(chunk_id)               # its neighbours, best first
    db.embeddings(0)                      # float16 [rows, d], memory-mapped
    db.search("how do generators work", k=5)
    db.training(split="train")            # a PyTorch iterable dataset

A `Database` reads the manifest once and follows it: it keeps the picture of the moment it was opened, and says so when
a build has changed it since (`retrodb.snapshot`). It runs no code from the database and follows no path out of it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from retrodb.chunking.tokenizer import ChunkTokenizer, load_tokenizer, tokenizer_from_json
from retrodb.corpus.records import is_unicode
from retrodb.deletions import Deletions
from retrodb.encoding import EncoderFiles, EncoderIdentity, chunk_texts, identify, resolve_encoder
from retrodb.errors import DamagedError, InputError, MismatchError
from retrodb.manifest import MANIFEST_NAME, Manifest, Shard, shard_of, taken_from
from retrodb.quality.summary import summarise
from retrodb.schemas import ID_SHIFT
from retrodb.snapshot import Snapshot
from retrodb.storage import Storage
from retrodb.units import refuse_table
from retrodb.versions import load_version

if TYPE_CHECKING:
    from retrodb.candidates import CandidateBatch, Candidates
    from retrodb.encoding.encoder import Encoder
    from retrodb.neighbours.searcher import Searcher
    from retrodb.spans.reader import QueryBatch
    from retrodb.training import TrainingDataset

_ROW_MASK: Final = (1 << ID_SHIFT) - 1
_CACHED_GROUPS: Final = 16


@dataclass(frozen=True)
class Document:
    """One row of ``documents``."""

    document_id: int
    key: str
    source: str
    title: str | None
    text: str | None
    n_chunks: int | None
    metadata: str | None
    split: str


@dataclass(frozen=True)
class Chunk:
    """One row of ``chunks`` with its text: the exact source slice, widened to whole characters."""

    chunk_id: int
    document_id: int
    position: int
    tokens: tuple[int, ...]
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Neighbour:
    """One neighbour of a chunk or of a query: its distance (squared L2) or score (inner product)."""

    chunk_id: int
    document_id: int
    distance: float


class Database:
    """A database opened for reading."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self.storage = storage
        self.manifest = manifest
        # Of functions and not of methods: a circle would hold the version, for which `retrodb gc` waits, until Python's
        # collector came by.
        self._read_group = lru_cache(maxsize=_CACHED_GROUPS)(partial(_read_group, storage))
        self._group_starts = lru_cache(maxsize=4096)(partial(_group_starts, storage))

    @staticmethod
    def open(url: str, version: int | None = None) -> "Database":
        """Open the database at ``url``: the version that is current now, or a given one, for as long as it is open.

        Raises:
            InputError: there is none, or no such version.
            MismatchError: it was made by a later schema version.
            DamagedError: its manifest is malformed, or lost.
        """
        storage = Storage(url)
        manifest = load_version(storage, version)
        if manifest is None:
            if Manifest.recover(storage) is not None:
                raise DamagedError(
                    f"{storage.url} has lost its {MANIFEST_NAME}. Run the build again: it is put back from its copy."
                )
            storage.check_bucket()
            raise InputError(f"{storage.url} is not a retrodb database: it has no {MANIFEST_NAME}.")
        return Database(Snapshot(url, manifest), manifest)

    def __repr__(self) -> str:
        rows = ", ".join(f"{self.manifest.rows(table):,} {table}" for table in self.manifest.tables)
        return f"<retrodb database {self.storage.url}: {rows or 'empty'}>"

    def close(self) -> None:
        """Hold the version no longer: `retrodb gc` may retire it. What is read later may be refused then."""
        if isinstance(self.storage, Snapshot):
            self.storage.release()

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def version(self) -> int:
        """The id of the version that is open: what its answers come from."""
        return self.manifest.version.id

    def summary(self) -> dict[str, Any]:
        """What the database is: counts per stage, fingerprints, recall, sizes (see ``retrodb info --json``).

        Raises:
            DamagedError: the manifest does not say.
        """
        with self._taken_from_manifest():
            return summarise(self.manifest, self.storage.url)

    def _taken_from_manifest(self) -> AbstractContextManager[None]:
        return taken_from(self.storage.describe(MANIFEST_NAME))

    # -- tables ----------------------------------------------------------------------------------------------------

    def tables(self, name: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The shards of a Parquet table, one Arrow table a shard."""
        for shard in self.manifest.shards(name):
            yield self.storage.read_table(shard, list(columns) if columns else None)

    @cached_property
    def deletions(self) -> Deletions:
        """What is deleted, and still in the tables' files: everything here but `tables` passes over it."""
        return Deletions.of(self.storage, self.manifest)

    def documents(self) -> Iterator[Document]:
        """All documents, in order, but the deleted ones."""
        for table in self.tables("documents"):
            there = table.filter(~self.deletions.of_documents(table["document_id"].to_numpy()))
            for batch in there.to_batches(max_chunksize=256):
                yield from (_document(row) for row in batch.to_pylist())

    def chunks(self) -> Iterator[pa.Table]:
        """The ``chunks`` table, shard by shard, but those of deleted documents."""
        for table in self.tables("chunks"):
            gone = self.deletions.of_chunks(table["chunk_id"].to_numpy())
            yield table.filter(~gone) if gone.any() else table

    def embeddings(self, shard: int) -> np.ndarray:
        """float16 [rows, d]: the vectors of chunk shard number ``shard``, memory-mapped."""
        return self.storage.read_array(self._shard("embeddings", shard))

    def document(self, document_id: int) -> Document:
        """One document. Raises InputError when it does not exist, or is deleted."""
        self._refuse_deleted(document_id, self.deletions.of_documents)
        return _document(self._row("documents", document_id))

    def chunk(self, chunk_id: int) -> Chunk:
        """One chunk with its text. Raises InputError when it does not exist, or is deleted."""
        self._refuse_deleted(chunk_id, self.deletions.of_chunks)
        row = self._row("chunks", chunk_id)
        tokens = tuple(row["tokens"][: row["n_tokens"]])
        text = self._chunk_text(row, tokens)
        return Chunk(chunk_id, row["document_id"], row["position"], tokens, row["start"], row["end"], text)

    def continuation(self, chunk_id: int) -> Chunk | None:
        """The chunk that follows in the same document, if there is one."""
        try:
            following = self.chunk(chunk_id + 1)
        except InputError:
            return None
        return following if following.document_id == self._row("chunks", chunk_id)["document_id"] else None

    def neighbours(self, chunk_id: int) -> list[Neighbour]:
        """The stored neighbours of a chunk, best first, but deleted ones. Raises InputError as `chunk` does."""
        self._refuse_deleted(chunk_id, self.deletions.of_chunks)
        row = self._row("neighbours", chunk_id)
        columns = (row["neighbour_ids"], row["neighbour_document_ids"], row["distances"])
        found = [Neighbour(*cells) for cells in zip(*columns, strict=True) if cells[0] is not None]
        gone = self.deletions.of_chunks(np.array([one.chunk_id for one in found], dtype=np.int64))
        return [one for one, deleted in zip(found, gone, strict=True) if not deleted]

    def training(self, split: str | None = "train", **options: Any) -> "TrainingDataset":
        """A PyTorch iterable dataset over the training sequences: see `retrodb.training.dataset`.

        Args:
            split: ``train``, ``validation``, or None for both.
            options: rank, world_size, shuffle, seed, ..., passed on.
        """
        refuse_table(self.manifest, "training", self.storage.url)
        from retrodb.training.dataset import TrainingDataset  # noqa: PLC0415 - imports torch

        return TrainingDataset(self.storage, self.manifest, split=split, **options)

    def spans(self) -> Iterator[pa.Table]:
        """The ``spans`` table, shard by shard, without those of deleted documents."""
        for table in self.tables("spans"):
            yield table.filter(~self.deletions.of_documents(table["document_id"].to_numpy()))

    def queries(self, split: str | None = "train", **options: Any) -> "Iterator[QueryBatch]":
        """The masked queries in batches of arrays: see `retrodb.spans.reader.read_queries`.

        Args:
            split: ``train``, ``validation``, or None for both.
            options: batch, shuffle, rank, world_size, passed on.

        Raises:
            InputError: there are none; make them by ``retrodb spans``.
        """
        from retrodb.spans.reader import read_queries  # noqa: PLC0415

        return read_queries(self.storage, self.manifest, split=split, **options)

    # -- search ----------------------------------------------------------------------------------------------------

    @property
    def encoder_identity(self) -> EncoderIdentity:
        """What made the vectors. Raises InputError when there are none yet."""
        recorded = self.manifest.fingerprints.get("encoder")
        if not recorded:
            raise InputError(f"{self.storage.url} has no embeddings yet; run the build to its end.")
        with self._taken_from_manifest():
            return EncoderIdentity.from_json(recorded)

    def encoder(self, spec: str | None = None, device: str = "auto") -> "Encoder":
        """The encoder that made the vectors, loaded.

        Args:
            spec: where it is now, if not where it was.
            device: auto, cpu or cuda.

        Raises:
            InputError, MismatchError: as `encoder_files`.
        """
        from retrodb.encoding.encoder import load_cached  # noqa: PLC0415 - imports torch

        return load_cached(self.encoder_files(spec), self.encoder_identity.precision, device)

    def encoder_files(self, spec: str | None = None) -> EncoderFiles:
        """Where the encoder is that made the vectors.

        Args:
            spec: where it is now, if not where it was.

        Raises:
            InputError: nothing is there.
            MismatchError: what is found there is another encoder; names both fingerprints.
        """
        recorded = self.encoder_identity
        try:
            files = resolve_encoder(spec or recorded.name)
        except InputError as error:
            where = "" if spec else " Say where it is now with --encoder (in Python: encoder=)."
            raise InputError(f"{self.storage.url} was embedded by {recorded.name!r}: {error}{where}") from error
        found = identify(files, recorded.precision)
        if found.fingerprint != recorded.fingerprint:
            raise MismatchError(
                f"{self.storage.url} was embedded by {recorded.name!r} (fingerprint {recorded.fingerprint[:16]}); "
                f"{files.name!r} is another encoder (fingerprint {found.fingerprint[:16]}): "
                "their vectors cannot be compared. Query with the database's own encoder."
            )
        return files

    def embed(self, texts: Sequence[str], encoder: str | None = None) -> np.ndarray:
        """float16 [n, d]: texts through the one featuriser that made the database's vectors."""
        return self.encoder(encoder).embed(texts)

    def search(
        self, query: str | np.ndarray, k: int = 10, metric: str | None = None, encoder: str | None = None
    ) -> list[Neighbour]:
        """The ``k`` nearest chunks of a text, or of a vector [d], best first; distances exact, from stored vectors.

        Args:
            query: a text, embedded by the database's encoder, or a vector made by it.
            k: how many.
            metric: refused if it is not the database's; None takes the database's.
            encoder: refused if it is not the database's.

        Raises:
            MismatchError: another metric or encoder, or a vector of another width.
            InputError: the database has no index yet; ``k`` is below 1; or the query is no text and no vector.
        """
        if k < 1:
            raise InputError(f"k is {k}: ask for at least one neighbour.")
        if isinstance(query, str) and not is_unicode(query):
            raise InputError(f"the query {query!r} holds bytes that are not UTF-8.")
        if not isinstance(query, str) and np.ndim(query) != 1:
            raise InputError(
                f"a query is a text or a vector of {self.encoder_identity.dimension} numbers, not "
                f"{f'an array of shape {list(query.shape)}' if isinstance(query, np.ndarray) else repr(query)}."
            )
        vector = self.embed([query], encoder)[0] if isinstance(query, str) else np.asarray(query)
        found = self._searcher.search(vector[None, :], k, metric)
        columns = (found.neighbour_ids[0], found.neighbour_document_ids[0], found.distances[0])
        rows = zip(*(column[: found.n_valid[0]].tolist() for column in columns), strict=True)
        return [Neighbour(*row) for row in rows]

    def candidates(self, queries: Sequence[str] | np.ndarray, k: int = 8, **options: Any) -> "CandidateBatch":
        """What a REALM trainer asks for: the null document and the best blocks of each query, `Candidates.of`.

        Args:
            queries: texts, embedded by the database's encoder, or vectors [q, d] made by it.
            k: slots; slot 0 is the null document.
            options: own_chunks, own_documents, own_keys, exclude, metric, vectors, tokens, encoder.

        Raises:
            InputError: it is a database of chunks, or has no index yet; or the arguments do not fit.
            MismatchError: another metric or encoder, or vectors of another width.
        """
        encoder = options.pop("encoder", None)
        if isinstance(queries, str):
            raise InputError(f"queries are a list of texts, or vectors [q, d]: give [{queries[:40]!r}].")
        asked = queries if isinstance(queries, np.ndarray) else self.embed(list(queries), encoder)
        return self._candidates.of(asked, k, **options)

    @cached_property
    def _candidates(self) -> "Candidates":
        from retrodb.candidates import Candidates  # noqa: PLC0415 - imports faiss

        with self._taken_from_manifest():
            return Candidates(self.storage, self.manifest, self._searcher)

    @property
    def metric(self) -> str:
        """``l2`` or ``ip``: what the index compares by. Raises InputError when there is none yet."""
        return self._searcher.metric

    @cached_property
    def _searcher(self) -> "Searcher":
        from retrodb.neighbours.searcher import Searcher  # noqa: PLC0415 - imports faiss

        with self._taken_from_manifest():
            return Searcher(self.storage, self.manifest)

    # -- text ------------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> ChunkTokenizer:
        """The tokenizer that cut the chunks.

        Raises:
            MismatchError: the one found under its name is another.
        """
        recorded = self.manifest.fingerprints.get("tokenizer")
        if not recorded:
            raise InputError(f"{self.storage.url} has no chunks yet; run the build to its end.")
        if recorded.get("stored"):
            tokenizer = tokenizer_from_json(self.storage.read_bytes(recorded["stored"]), recorded["name"])
        elif recorded["name"] == "encoder":
            folder = resolve_encoder(self.manifest.config["encoder"]).transformer
            tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
        else:
            tokenizer = load_tokenizer(recorded["name"])
        if tokenizer.fingerprint != recorded["fingerprint"]:
            raise MismatchError(
                f"{self.storage.url} was cut by a tokenizer with fingerprint {recorded['fingerprint'][:16]}; "
                f"{recorded['name']!r} here has {tokenizer.fingerprint[:16]}."
            )
        return tokenizer

    def _chunk_text(self, row: Mapping[str, Any], tokens: Sequence[int]) -> str:
        text = self.document(row["document_id"]).text
        if text is None:
            return self.tokenizer.decode(tokens).decode(errors="replace")
        bounds = (np.array([row["start"]]), np.array([row["end"]]))
        return chunk_texts(text.encode(), *bounds)[0]

    # -- rows ------------------------------------------------------------------------------------------------------

    def _refuse_deleted(self, identifier: int, of: Callable[[np.ndarray], np.ndarray]) -> None:
        if len(self.deletions) and bool(of(np.array([identifier], dtype=np.int64))[0]):
            raise InputError(f"{identifier} was deleted from {self.storage.url} (version {self.version}).")

    def _shard(self, table: str, number: int) -> Shard:
        for shard in self.manifest.shards(table):
            if shard.number == number:
                return shard
        if table not in self.manifest.tables:
            refuse_table(self.manifest, table, self.storage.url)
            raise InputError(f"{self.storage.url} has no {table} yet; run the build to its end.")
        raise InputError(f"{self.storage.url} has no shard {number} of {table}.")

    def _row(self, table: str, identifier: int) -> dict[str, Any]:
        """The row of an id: at the place the id tells, or, where a shard was compacted, found by search."""
        try:
            shard = self._shard(table, shard_of(identifier))
        except InputError:
            if table not in self.manifest.tables:
                raise
            raise InputError(f"there is no id {identifier} in {table} of {self.storage.url}.") from None
        column = "document_id" if table == "documents" else "chunk_id"
        starts = self._group_starts(shard)
        place = min(identifier & _ROW_MASK, max(int(starts[-1]) - 1, 0))
        group = int(np.searchsorted(starts, place, side="right")) - 1
        for candidate in range(min(group, len(starts) - 2), -1, -1):
            rows = self._read_group(shard, candidate)
            ids = rows[column].to_numpy()
            at = int(np.searchsorted(ids, identifier))
            if at < len(ids) and ids[at] == identifier:
                row: dict[str, Any] = rows.slice(at, 1).to_pylist()[0]
                return row
            if at > 0:
                break
        raise InputError(f"there is no id {identifier} in {table} of {self.storage.url}.")


def _group_starts(storage: Storage, shard: Shard) -> tuple[int, ...]:
    with storage.open_parquet(shard) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    return tuple(int(start) for start in np.concatenate([[0], np.cumsum(sizes)]))


def _read_group(storage: Storage, shard: Shard, group: int) -> pa.Table:
    with storage.open_parquet(shard) as file:
        try:
            return file.read_row_group(group, use_threads=False)
        except (pa.ArrowInvalid, OSError) as error:
            raise DamagedError(f"cannot read {storage.describe(shard)}: {error}. Run verify.") from error


def _document(row: Mapping[str, Any]) -> Document:
    names = ("document_id", "key", "source", "title", "text", "n_chunks", "metadata", "split")
    return Document(**{name: row[name] for name in names})
