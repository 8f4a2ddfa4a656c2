"""What a model takes from a database and from nowhere else: tokenizer, m, n and k' (`DataSettings`)."""

from dataclasses import asdict, dataclass
from typing import Any

from retrodb.database import Database
from retrodb.errors import InputError, MismatchError
from retrodb.units import refuse_table

_SHOWN = 16


@dataclass(frozen=True)
class DataSettings:
    """The data settings of a database's training rows.

    Attributes:
        tokenizer: its name.
        tokenizer_fingerprint: what it is.
        vocabulary: number of token ids.
        chunk_tokens: m.
        sequence_tokens: n.
        neighbours: k', joined into the rows.
        training_fingerprint: of the stage that made the rows: what tells one database from another.
    """

    tokenizer: str
    tokenizer_fingerprint: str
    vocabulary: int
    chunk_tokens: int
    sequence_tokens: int
    neighbours: int
    training_fingerprint: str

    @staticmethod
    def of(database: Database) -> "DataSettings":
        """Of a finished database. Raises InputError where it has no training rows."""
        manifest = database.manifest
        refuse_table(manifest, "training", database.storage.url)
        state = manifest.stages.get("training")
        if state is None or not manifest.shards("training"):
            url = database.storage.url
            raise InputError(f"{url} has no training rows. Finish it: retrodb build ... --out {url}")
        config = manifest.config
        return DataSettings(
            tokenizer=str(config["tokenizer"]),
            tokenizer_fingerprint=str(manifest.fingerprints["tokenizer"]["fingerprint"]),
            vocabulary=database.tokenizer.vocabulary_size,
            chunk_tokens=int(config["chunk_tokens"]),
            sequence_tokens=int(config["sequence_tokens"]),
            neighbours=int(config["training_neighbours"]),
            training_fingerprint=state.fingerprint,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def check_model(self, trained: "DataSettings", model: str, database: str) -> None:
        """Refuse a model that was trained on other tokens or other chunks than this database has.

        Another database with the same tokenizer and m is welcome: that is how one measures what it is worth.

        Raises:
            MismatchError: names both.
        """
        if trained.tokenizer_fingerprint != self.tokenizer_fingerprint:
            raise MismatchError(
                f"{model} was trained with the tokenizer {trained.tokenizer!r} (fingerprint"
                f" {trained.tokenizer_fingerprint[:_SHOWN]}); {database} has {self.tokenizer!r} (fingerprint"
                f" {self.tokenizer_fingerprint[:_SHOWN]}): its ids mean other texts. Use a database built with the"
                " model's tokenizer, or train a model on this one."
            )
        if trained.chunk_tokens != self.chunk_tokens:
            raise MismatchError(
                f"{model} was trained on chunks of {trained.chunk_tokens} tokens; those of {database} have"
                f" {self.chunk_tokens}. Build a database with --chunk-tokens {trained.chunk_tokens}."
            )

    def check_same(self, trained: "DataSettings", checkpoint: str, database: str) -> None:
        """Refuse to go on with a run on other rows than it was begun on.

        Raises:
            MismatchError: names both fingerprints.
        """
        self.check_model(trained, checkpoint, database)
        if trained.training_fingerprint != self.training_fingerprint:
            raise MismatchError(
                f"{checkpoint} was begun on rows with fingerprint {trained.training_fingerprint[:_SHOWN]}; those"
                f" of {database} have {self.training_fingerprint[:_SHOWN]}: it is another database, or was rebuilt with"
                " other settings. Name another --out to begin anew."
            )
