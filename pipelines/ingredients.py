"""What a build is made with, checked before anything is written: the encoder, the tokenizer, the folder.

A build that stops before anything is embedded needs no encoder, and looks for none.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from retrodb.pipelines import stages
from retrodb.pipelines.stages import TokenizerIdentity

from retrodb.chunking import DEFAULT_TOKENIZER, OWN_TOKENIZER, ChunkTokenizer, load_tokenizer, token_type_for
from retrodb.chunking.pairs import PairTemplate
from retrodb.chunking.tokenizer import tokenizer_from_json
from retrodb.config import BuildConfig, RunSettings
from retrodb.encoding import (
    DEFAULT_ENCODER,
    EncoderFiles,
    EncoderIdentity,
    check_weights,
    choose_device,
    cpu_precision,
    cuda_precision,
    identify,
    longest_input,
    resolve_encoder,
)
from retrodb.errors import DamagedError, InputError
from retrodb.lock import LOCK_NAME
from retrodb.manifest import WORK_FOLDER, Manifest
from retrodb.storage import TEMPORARY_PREFIX, Storage

_MANY_VECTORS = 1_000_000


@dataclass(frozen=True)
class ChosenEncoder:
    """The encoder of a build: where it is, what it is, and whether its precision was asked for."""

    files: EncoderFiles
    identity: EncoderIdentity
    precision_given: bool

    def settled(self, manifest: Manifest) -> EncoderIdentity:
        """``auto`` keeps the precision a database already has, so that another machine does not re-embed it."""
        recorded = manifest.fingerprints.get("encoder")
        if self.precision_given or not recorded:
            return self.identity
        candidate = replace(self.identity, precision=recorded["precision"])
        return candidate if candidate.fingerprint == recorded["fingerprint"] else self.identity


@dataclass(frozen=True)
class Ingredients:
    """The resolved encoder and tokenizer of a build.

    ``encoder`` is None where the build stops before the embed stage. ``tokenizer`` is None for ``train:VOCAB``, which
    the chunk stage learns; ``tokenizer_spec`` is what `load_tokenizer` takes, or where the database keeps a learnt one.
    ``pairs`` is how the encoder reads a title with a body, where the unit is the block.
    """

    encoder: ChosenEncoder | None
    tokenizer_spec: str
    tokenizer: TokenizerIdentity | None
    pairs: PairTemplate | None = None

    @property
    def stored(self) -> bool:
        """Whether the tokenizer is the database's own: learnt already, or still to be learnt."""
        return self.tokenizer is None or self.tokenizer.stored is not None

    def settled_encoder(self, manifest: Manifest) -> EncoderIdentity:
        """The encoder of a build that embeds, with the precision it is to have; see `ChosenEncoder.settled`."""
        assert self.encoder is not None, "only a build that stops before the embed stage has no encoder"
        return self.encoder.settled(manifest)

    def prove(self, manifest: Manifest, run: RunSettings) -> None:
        """Load another encoder than the database has, before the vectors of the old one give way.

        Raises:
            InputError: it cannot be loaded.
        """
        if "embed" not in manifest.stages or self.encoder is None:
            return
        if self.encoder.settled(manifest).fingerprint == manifest.fingerprints["encoder"]["fingerprint"]:
            return
        from retrodb.encoding.encoder import try_out  # noqa: PLC0415 - imports torch

        device = run.device if run.runner == "local" else "cpu"  # the card is where the workers are
        try_out(self.encoder.files, self.encoder.identity.precision, device)


def located(config: BuildConfig) -> BuildConfig:
    """With the absolute paths of an encoder or tokenizer given as a path: a database is read from anywhere; and with
    blocks of a length that the encoder reads."""
    known = (DEFAULT_ENCODER, DEFAULT_TOKENIZER, OWN_TOKENIZER)
    specs = {"encoder": config.encoder, "tokenizer": config.tokenizer}
    paths = {name: Path(spec).expanduser() for name, spec in specs.items() if spec not in known}
    config = config.model_copy(update={name: str(path.absolute()) for name, path in paths.items() if path.exists()})
    return _fitted(config) if config.unit == "block" else config


def _fitted(config: BuildConfig) -> BuildConfig:
    """With blocks that the encoder reads whole. What is given is kept, or refused; the default follows the encoder.

    Raises:
        InputError: there is no such encoder, or it reads fewer tokens than were asked for.
    """
    longest = longest_input(resolve_encoder(config.encoder))
    if config.chunk_tokens <= longest:
        return config
    if "chunk_tokens" in config.model_fields_set:
        raise InputError(
            f"--chunk-tokens {config.chunk_tokens}: the encoder {config.encoder!r} reads {longest} tokens at once, and "
            f"a block is never cut to fit. Give {longest} or less, or leave it out."
        )
    return config.model_copy(update={"chunk_tokens": longest})


def check_surroundings(config: BuildConfig, run: RunSettings) -> None:
    """What is needed beside the encoder, whichever that is.

    Raises:
        InputError: the device, or the tokenizer where it has a name of its own, is not here.
    """
    if run.runner == "local":
        choose_device(run.device)
    if config.tokenizer != OWN_TOKENIZER and not config.tokenizer.startswith("train:"):
        load_tokenizer(config.tokenizer)


def resolve(config: BuildConfig, run: RunSettings, learnt: TokenizerIdentity | None = None) -> Ingredients:
    """Find the encoder, the tokenizer and the device, as far as the stages up to ``run.until`` use them.

    Args:
        config: names them.
        run: how the build is carried out.
        learnt: the tokenizer that the database keeps, where it is to be used again.

    Raises:
        InputError: one of them does not exist, or they do not fit the other settings.
    """
    encoder = _choose_encoder(config, run) if run.until in (None, *stages.downstream("embed")) else None
    spec, pairs = config.tokenizer, None
    if spec == OWN_TOKENIZER:
        files = encoder.files if encoder else resolve_encoder(config.encoder)
        spec = _own_tokenizer(files)
        pairs = PairTemplate.load(files.transformer) if config.unit == "block" else None
    tokenizer = learnt
    if learnt is not None and learnt.stored is not None:
        spec = learnt.stored
    elif not spec.startswith("train:"):
        tokenizer = tokenizer_identity(load_tokenizer(spec), config.tokenizer)
    lossless = tokenizer is None or tokenizer.lossless
    if not config.text and not lossless and config.tokenizer != OWN_TOKENIZER:
        raise InputError(
            f"--no-text needs a lossless tokenizer, because the text to embed then comes from the tokens; "
            f"{config.tokenizer!r} is not lossless. Keep the text, or use gpt2, train:VOCAB or encoder."
        )
    if config.index_key is not None and encoder is not None:
        _check_index_key(config, encoder.identity.dimension)
    return Ingredients(encoder, spec, tokenizer, pairs)


def _choose_encoder(config: BuildConfig, run: RunSettings) -> ChosenEncoder:
    files = resolve_encoder(config.encoder)
    check_weights(files)
    if run.runner == "local":
        choose_device(run.device)  # that a card is missing is said now, and not after the chunk stage
    given = config.precision != "auto"
    return ChosenEncoder(files, identify(files, config.precision if given else _automatic_precision(run)), given)


def _own_tokenizer(files: EncoderFiles) -> str:
    path = files.transformer / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"--tokenizer encoder: the encoder {files.name!r} has no tokenizer.json.")
    return str(path)


def _check_index_key(config: BuildConfig, dimension: int) -> None:
    """Refuse a key before hours of embedding, not after.

    Raises:
        InputError: no index of this key is possible for these vectors.
    """
    from retrodb.index import choose_key  # noqa: PLC0415 - imports faiss, and only few name a key

    try:
        choose_key(_MANY_VECTORS, dimension, config.memory_bytes, config.metric, config.index_key)
    except InputError as error:
        raise InputError(f"--index-key {config.index_key!r}: {error}") from error


def tokenizer_identity(tokenizer: ChunkTokenizer, name: str, stored: str | None = None) -> TokenizerIdentity:
    """What the manifest records of a tokenizer."""
    return TokenizerIdentity(
        name=name,
        fingerprint=tokenizer.fingerprint,
        vocabulary_size=tokenizer.vocabulary_size,
        lossless=tokenizer.lossless,
        token_type=token_type_for(tokenizer.vocabulary_size),
        stored=stored,
    )


def _automatic_precision(run: RunSettings) -> str:
    """What suits the workers' processor: this machine's, or, of workers elsewhere with a GPU, such as have bfloat16."""
    if run.runner != "local":
        on_gpu = run.device == "cuda" or (run.runner == "dataflow" and run.device == "auto")
        return "bf16" if on_gpu else cpu_precision()
    return cuda_precision() if choose_device(run.device) == "cuda" else cpu_precision()


def same_ingredients(
    out: Storage, current: Manifest, config: BuildConfig, run: RunSettings
) -> tuple[BuildConfig, Ingredients]:
    """The encoder and the tokenizer of a database, for other documents; with the settings that name them.

    Raises:
        InputError: what is found under their names is another.
        DamagedError: a tokenizer that was learnt is lost.
    """
    recorded = current.fingerprints["tokenizer"]
    learnt = None
    if stored := recorded.get("stored"):
        data = out.read_if_there(str(stored))
        if data is None:
            raise DamagedError(f"{out.describe(stored)} is missing. Put it back from a copy of the database.")
        learnt = tokenizer_identity(tokenizer_from_json(data, config.tokenizer), config.tokenizer, str(stored))
    elsewhere = (
        f"Where does it lie now? `retrodb refresh {out.url} --encoder PLACE` records that, and makes no new version of "
        "the same weights."
    )
    try:
        resolve_encoder(config.encoder)
    except InputError as error:
        raise InputError(f"{error} The database's vectors were made by that encoder. {elsewhere}") from error
    found = resolve(config, run, learnt)
    if found.tokenizer is None or found.tokenizer.fingerprint != recorded["fingerprint"]:
        raise InputError(f"the tokenizer {config.tokenizer!r} is not the one that cut the database's chunks.")
    settled = found.settled_encoder(current)
    if settled.fingerprint != current.fingerprints["encoder"]["fingerprint"]:
        raise InputError(f"the encoder {config.encoder!r} is not the one that made the database's vectors. {elsewhere}")
    if found.encoder is not None:
        found = replace(found, encoder=replace(found.encoder, identity=settled, precision_given=True))
    return config, found


def refuse_foreign(storage: Storage) -> None:
    """Refuse a folder that is not a database and not empty.

    Raises:
        InputError: it holds other things, or is a file.
        UnreachableError: its bucket does not exist, or the store does not answer.
        DamagedError: it is a database, but neither its manifest nor the copy is whole.
    """
    if Manifest.recover(storage) is not None:
        return
    storage.check_bucket()
    if storage.is_a_file():
        raise InputError(f"--out {storage.url} is a file; name a folder for the database.")
    if storage.is_empty():
        return
    foreign = [name for name in storage.list_files("") if name != LOCK_NAME and not name.startswith(TEMPORARY_PREFIX)]
    foreign += [name for name in storage.list_folders("") if name != WORK_FOLDER]
    if foreign:
        raise InputError(
            f"--out {storage.url} is not a retrodb database and not empty (it holds {foreign[0]!r}); "
            "name an empty or a new folder."
        )
