"""What the reference REALM trainer reads: masked queries with their candidates, and blocks for its warm start."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from retrodb.database import Database
from retrodb.errors import InputError, MismatchError
from retrodb.model.realm.cloze import KEPT_SHARE
from retrodb.model.realm.config import QUERY_TOKENS
from retrodb.model.realm.packing import Texts
from retrodb.model.realm.realm import MaskedQueries
from retrodb.neighbours.candidates import CandidateBatch
from retrodb.sizes import count_of
from retrodb.spans.reader import QueryBatch
from retrodb.training.columns import lists, scalars


def check_blocks(db: Database, reader: torch.nn.Module) -> None:
    """Refuse blocks that a model cannot be trained on.

    Args:
        db: a database of blocks.
        reader: the BERT that reads ``[CLS] query [SEP] body [SEP]``; a block's budget counts special tokens already.

    Raises:
        MismatchError: they are not compared by inner products, which is what is trained.
        InputError: one may be longer than the reader takes beside a query.
    """
    url = db.storage.url
    if db.metric != "ip":
        raise MismatchError(
            f"{url} compares by {db.metric}: a retriever learns inner products. Build it with --metric ip."
        )
    budget = int(db.manifest.config["chunk_tokens"])
    positions = int(reader.config.max_position_embeddings)  # type: ignore[union-attr,arg-type]
    if budget + QUERY_TOKENS > positions:
        raise InputError(
            f"a block of {url} has up to {budget} wordpieces and a question {QUERY_TOKENS}: the reader "
            f"takes {positions} together. Build it with --chunk-tokens {positions - QUERY_TOKENS}."
        )


def texts_of(tokens: npt.NDArray, lengths: npt.NDArray) -> Texts:
    """Token rows [.., L] with their lengths [..] as [n, L]."""
    flat = tokens.reshape(lengths.size, tokens.shape[-1]).astype(np.int64)
    return Texts(torch.from_numpy(flat), torch.from_numpy(lengths.reshape(-1).astype(np.int64)))


def trimmed(texts: Texts) -> Texts:
    """Without columns that are padding in every row."""
    return Texts(texts.ids[:, : int(texts.lengths.max()) if len(texts.lengths) else 0], texts.lengths)


def masked_batch(queries: QueryBatch, found: CandidateBatch) -> MaskedQueries:
    """Queries beside the candidates that were found for them, with their tokens."""
    assert found.tokens is not None, "ask for candidates with tokens=True"
    assert found.n_tokens is not None, "likewise"
    assert found.title_tokens is not None, "likewise"
    assert found.n_title_tokens is not None, "likewise"
    wanted = np.arange(queries.masked_positions.shape[1])[None, :] < queries.n_masked[:, None]
    return MaskedQueries(
        trimmed(texts_of(queries.tokens, queries.n_tokens)),
        torch.from_numpy(np.maximum(queries.masked_positions, 0).astype(np.int64)),
        torch.from_numpy(queries.target_ids.astype(np.int64)),
        torch.from_numpy(wanted),
        trimmed(texts_of(found.title_tokens, found.n_title_tokens)),
        trimmed(texts_of(found.tokens, found.n_tokens)),
        torch.from_numpy(found.present.copy()),
    )


def holds_answer(queries: QueryBatch, found: CandidateBatch) -> npt.NDArray[np.bool_]:
    """bool [q, k]: which candidates' bodies hold the masked wordpieces, one after the other.

    What the paper's reviewers asked for, retrieval recall during pre-training, counts these.
    """
    assert found.tokens is not None, "ask for candidates with tokens=True"
    assert found.n_tokens is not None, "likewise"
    answer = np.zeros(found.ids.shape, dtype=bool)
    for row in range(len(queries)):
        target = queries.target_ids[row, : int(queries.n_masked[row])]
        bodies = found.tokens[row]
        width = bodies.shape[1] - len(target) + 1
        if width < 1 or not len(target):
            continue
        windows = np.lib.stride_tricks.sliding_window_view(bodies, len(target), axis=1)
        whole = np.arange(width)[None, :] + len(target) <= found.n_tokens[row][:, None]
        answer[row] = ((windows == target).all(-1) & whole).any(-1)
    return answer


def cloze_batches(db: Database, batch: int, seed: int, ends: tuple[int, ...]) -> Iterator[tuple[Texts, Texts, Texts]]:
    """Endless (queries, titles, bodies) for the Inverse Cloze Task: a sentence of each block, and the block without it.

    Blocks hold whole sentences; here they are told apart by the wordpieces that end one, which is as good as the stored
    boundaries for a task that only has to take *a* piece out. A block of one sentence is passed over.

    Args:
        db: a database of blocks.
        batch: blocks of a batch; all, where the database has fewer.
        seed: of the order, of the sentence, and of whether it stays in its block.
        ends: the token ids of the marks that end a sentence.

    Raises:
        InputError: there are not enough blocks with two sentences.
    """
    random = np.random.default_rng(seed)
    shards = db.manifest.shards("chunks")
    while True:
        made = 0
        held: list[tuple[npt.NDArray, npt.NDArray, npt.NDArray]] = []
        for at in random.permutation(len(shards)):
            table = db.storage.read_table(shards[at], ["chunk_id", "tokens", "n_tokens", "title_tokens"])
            tokens, lengths = lists(table, "tokens"), scalars(table, "n_tokens")
            titles = table["title_tokens"]
            gone = db.deletions.of_chunks(scalars(table, "chunk_id"))
            for row in random.permutation(table.num_rows):
                pair = None if gone[row] else _taken_out(tokens[row, : lengths[row]], ends, random)
                if pair is None:
                    continue
                held.append((pair[0], np.array(titles[int(row)].as_py(), dtype=np.int64), pair[1]))
                if len(held) == batch:
                    made += 1
                    yield _cloze_texts(held)
                    held = []
        if not made:
            if len(held) < 2:
                raise InputError(
                    f"{db.storage.url} has {count_of(len(held), 'block')} of two sentences, and a warm start tells one "
                    "from another: give --cloze-steps 0."
                )
            yield _cloze_texts(held)


def _cloze_texts(held: list[tuple[npt.NDArray, npt.NDArray, npt.NDArray]]) -> tuple[Texts, Texts, Texts]:
    sides = [Texts.of([list(map(int, one[side])) for one in held]) for side in range(3)]
    return sides[0], sides[1], sides[2]


def _taken_out(
    body: npt.NDArray, ends: tuple[int, ...], random: np.random.Generator
) -> tuple[npt.NDArray, npt.NDArray] | None:
    """A sentence of a block, and the block it is to find; None where the block has but one."""
    stops = np.flatnonzero(np.isin(body, ends)) + 1
    bounds = np.unique(np.concatenate([[0], stops, [len(body)]]))
    sizes = np.diff(bounds)
    if len(sizes) < 2:
        return None
    pick = int(random.integers(len(sizes)))
    first, last = int(bounds[pick]), int(bounds[pick + 1])
    rest = body if random.random() < KEPT_SHARE else np.concatenate([body[:first], body[last:]])
    return body[first : min(last, first + QUERY_TOKENS)], rest
