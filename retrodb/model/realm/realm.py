"""The whole model: how it begins, what it computes, and the encoder that a database takes from it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from retrodb.encoding import EncoderFiles, resolve_encoder
from retrodb.encoding.source import card_pooling
from retrodb.model.realm.bert import bert_card, blank_bert, load_bert, special_tokens
from retrodb.model.realm.config import RealmConfig
from retrodb.model.realm.objective import Marginal, marginalise
from retrodb.model.realm.packing import Texts
from retrodb.model.realm.reader import Reader
from retrodb.model.realm.retriever import Retriever

_COPIED: Final = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@dataclass(frozen=True)
class MaskedQueries:
    """A batch of masked queries with their candidates.

    Attributes:
        queries: n of them, masked, at most 96 tokens each.
        positions, targets, wanted: int64, int64, bool [n, M]: the masked tokens (see `Reader.log_likelihood`).
        titles, bodies: n * c texts: the candidates of query 0, then of query 1, ..; slot 0 is the null document.
        valid: bool [n, c].
    """

    queries: Texts
    positions: torch.Tensor
    targets: torch.Tensor
    wanted: torch.Tensor
    titles: Texts
    bodies: Texts
    valid: torch.Tensor


class Realm(nn.Module):
    """Retriever and reader."""

    def __init__(self, config: RealmConfig, retriever: nn.Module, reader: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.retriever = Retriever(retriever, config)
        self.reader = Reader(reader, config)

    @staticmethod
    def start(encoder: str, dimension: int = 128, seed: int = 0) -> "Realm":
        """From a BERT's weights: both parts begin as it, the heads at random.

        Args:
            encoder: as ``build --encoder``; a BERT.
            dimension: of the vectors.
            seed: of what is random.

        Raises:
            InputError: there is no such encoder, or it is no BERT.
        """
        files = resolve_encoder(encoder)
        config = RealmConfig(
            bert=bert_card(files),
            dimension=dimension,
            pooling="mean" if card_pooling(files) == "mean" else "cls",
            **special_tokens(files),
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Realm(config, load_bert(files), load_bert(files))

    @staticmethod
    def blank(config: RealmConfig) -> "Realm":
        """Of a checkpoint's sizes, with weights to be loaded."""
        return Realm(config, *(blank_bert(config.bert) for _ in range(2)))

    def scores(self, batch: MaskedQueries) -> torch.Tensor:
        """float [n, c]: f(x, z) of each query with its candidates, with live weights on both sides."""
        n, slots = batch.valid.shape
        queries = self.retriever.queries(batch.queries)
        blocks = self.retriever.blocks(batch.titles, batch.bodies).view(n, slots, -1)
        return torch.einsum("nd,ncd->nc", queries, blocks)

    def forward(self, batch: MaskedQueries) -> Marginal:
        """The marginal likelihood of each query's masked tokens."""
        n, slots = batch.valid.shape
        likelihood = self.reader.log_likelihood(
            batch.queries.repeated(slots),
            batch.bodies,
            *(part.repeat_interleave(slots, 0) for part in (batch.positions, batch.targets, batch.wanted)),
        )
        return marginalise(self.scores(batch), likelihood.view(n, slots), batch.valid)

    def export(self, folder: Path, tokenizer: EncoderFiles) -> None:
        """Write the retriever as an encoder's folder: a BERT, its pooling, the projection; nothing normalises.

        It has its name only when it is whole, as a refresher asks of an export.

        Args:
            folder: what it is to be called.
            tokenizer: the encoder whose tokenizer the model reads with.
        """
        writing = folder.with_name(f".writing-{folder.name}")
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        self.retriever.bert.save_pretrained(writing, safe_serialization=True)  # type: ignore[operator]
        for name in _COPIED:
            if (tokenizer.transformer / name).exists():
                shutil.copy(tokenizer.transformer / name, writing / name)
        width = int(self.config.bert["hidden_size"])
        kind = "sentence_transformers.models"
        (writing / "1_Pooling").mkdir()
        (writing / "2_Dense").mkdir()
        modules: list[dict[str, Any]] = [
            {"idx": 0, "name": "0", "path": "", "type": f"{kind}.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Dense", "type": f"{kind}.Dense"},
        ]
        _write_json(writing / "modules.json", modules)
        mean = self.config.pooling == "mean"
        pooling = {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": not mean,
            "pooling_mode_mean_tokens": mean,
        }
        _write_json(writing / "1_Pooling" / "config.json", pooling)
        dense = {
            "in_features": width,
            "out_features": self.config.dimension,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
        _write_json(writing / "2_Dense" / "config.json", dense)
        weight = self.retriever.projection.weight.detach().cpu().contiguous()
        save_file({"linear.weight": weight}, writing / "2_Dense" / "model.safetensors")
        writing.rename(folder)

    def is_exported_as(self, folder: Path) -> bool:
        """Whether an encoder's folder is an export of this very retriever, as its projection tells, bit for bit."""
        try:
            weight = load_file(folder / "2_Dense" / "model.safetensors")["linear.weight"]
        except (OSError, SafetensorError, KeyError):
            return False
        return torch.equal(weight, self.retriever.projection.weight.detach().cpu())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
