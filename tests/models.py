"""What tests of the reference model share: tiny models and rows whose every rule can be seen."""

from pathlib import Path

import torch
from support import build_here, write_jsonl

from retrodb.model import Batch, ModelConfig, Retro
from retrodb.model.config import default_retrieval

torch.set_num_threads(1)  # these tensors are too small for threads, which wait for each other where cores are shared

M, SLOTS, K, VOCABULARY = 4, 6, 2, 50
N = M * SLOTS

DOCUMENTS = [[7, 7, 7, 8, 8, -1], [9, 9, 9, 9, 9, 9]]
"""Row 0: document 7 (4 + 4 + 2 tokens), 8 (4 + 3), an empty slot. Row 1: a document that fills the row."""
LENGTHS = [[4, 4, 2, 4, 3, 0], [4, 4, 4, 4, 4, 4]]


def make_config(*, layers: int = 4, retrieval: bool = True, gated: bool = False, **overrides) -> ModelConfig:
    sizes = {"width": 32, "layers": layers, "heads": 2}
    made = ModelConfig.preset("tiny", vocabulary=VOCABULARY, chunk_tokens=M, overrides=sizes)
    made = made.model_copy(update=overrides)
    chosen = default_retrieval(made.width, made.layers, gated=gated) if retrieval else None
    return made.model_copy(update={"retrieval": chosen})


def make_model(seed: int = 0, **settings) -> Retro:
    """A tiny model whose weights are large enough for every influence to show."""
    torch.manual_seed(seed)
    model = Retro(make_config(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            elif name.endswith("gate"):
                parameter.zero_()
    return model.eval()


def make_batch(seed: int = 0, neighbours: int = K) -> Batch:
    """The rows above; each chunk with ``neighbours`` neighbours, but chunk 1 of row 1 with none, chunk 2 with one."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randint(1, VOCABULARY, shape, generator=generator)

    lengths = torch.tensor([[M, M], [M, 3], [2, 0], [M, 1]])[torch.arange(SLOTS * neighbours) % 4]
    lengths = lengths.view(1, SLOTS, neighbours, 2).repeat(2, 1, 1, 1)
    lengths[1, 1], lengths[1, 2, 1:] = 0, 0
    lengths[0, 5] = 0
    return Batch.made(
        drawn(2, SLOTS, M),
        torch.tensor(LENGTHS),
        torch.tensor(DOCUMENTS),
        drawn(2, SLOTS, neighbours, 2, M),
        lengths,
    )


# -- a database to train on --------------------------------------------------------------------------------------------


def topics(count: int, first: int = 0) -> list[dict[str, str]]:
    """Short texts that say the same few things in many orders, so that neighbours help."""
    facts = [
        f"The {animal} of {place} eats {food} every {day} and sleeps under the old {tree}."
        for animal, place, food, day, tree in zip(
            ["otter", "heron", "badger", "lynx", "marten", "stork", "beaver"],
            ["Bergen", "Lund", "Turku", "Riga", "Gdansk", "Emden", "Aarhus"],
            ["trout", "frogs", "acorns", "hares", "berries", "snails", "willow bark"],
            ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
            ["oak", "ash", "elm", "pine", "birch", "larch", "yew"],
            strict=True,
        )
    ]
    return [
        {
            "id": f"t{number}",
            "text": f"Note {number}. "
            + " ".join(facts[(number * step + step) % 7] for step in range(1, 3 + number % 5)),
        }
        for number in range(first, first + count)
    ]


def build_topics(folder: Path, encoder: Path, **settings: object) -> Path:
    """A small database with a validation split: m = 16, n = 64, 8 neighbours kept, 2 joined."""
    source = write_jsonl(folder / "topics.jsonl", topics(40))
    held_out = write_jsonl(folder / "held-out.jsonl", topics(8, first=100))
    chosen = {
        "tokenizer": "train:400",
        "chunk_tokens": 16,
        "sequence_tokens": 64,
        "neighbours": 8,
        "dedup": "off",
        "decontaminate": False,
        "validation": [str(held_out)],
    }
    build_here([source], folder / "db", encoder=str(encoder), **{**chosen, **settings})
    return folder / "db"
