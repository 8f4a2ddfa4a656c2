"""RETRO: what may depend on what (Borgeaud et al. 2022, section 2, Algorithm 1), shown on values and on gradients."""

import itertools
from dataclasses import replace

import pytest
import torch
from models import DOCUMENTS, LENGTHS, SLOTS, K, M, N, make_batch, make_config, make_model

from retrodb.errors import InputError
from retrodb.model import Batch, ModelConfig, Retro
from retrodb.model.config import cross_attention_layers, parse_model


@pytest.fixture(scope="module")
def model():
    return make_model()


def place(chunk: int, token: int = 0) -> int:
    return chunk * M + token


def outputs(model: Retro, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(batch))


def changed_places(model: Retro, one: Batch, other: Batch, row: int) -> set[int]:
    """Valid places of a row whose output differs between two batches."""
    differs = (outputs(model, one)[row] != outputs(model, other)[row]).any(-1) & one.valid[row]
    return set(differs.nonzero().flatten().tolist())


def with_other_neighbours(batch: Batch, row: int, chunk: int) -> Batch:
    tokens = batch.neighbour_tokens.clone()
    tokens[row, chunk] = (tokens[row, chunk] + 17) % 50
    return Batch.made(batch.tokens, batch.lengths, batch.documents, tokens, batch.neighbour_lengths)


# -- layout ------------------------------------------------------------------------------------------------------------


def test_positions_count_within_the_document_and_skip_padding():
    positions = make_batch().positions[0][make_batch().valid[0]]
    assert positions.tolist() == [*range(10), *range(7)]


def test_a_target_is_the_next_token_of_the_same_document_and_a_document_s_last_token_has_none():
    batch = make_batch()
    expected = {}
    for row, (documents, lengths) in enumerate(zip(DOCUMENTS, LENGTHS, strict=True)):
        valid = [(place(s, i), d) for s, (d, n) in enumerate(zip(documents, lengths, strict=True)) for i in range(n)]
        for (here, document), (there, following) in itertools.pairwise(valid):
            if document == following:
                expected[row, here] = int(batch.tokens[row].flatten()[there])
    found = {(r, p): int(batch.targets[r, p]) for r, p in batch.predicts.nonzero().tolist()}
    assert found == expected
    assert (0, 9) not in found
    assert (0, 18) not in found


def test_shifting_to_attending_chunks_and_back_keeps_what_has_one():
    values = torch.arange(2.0 * N).view(2, N) + 1
    batch = make_batch()
    assert batch.shifted(values)[0, 1].tolist() == values[0, 2 * M - 1 : 3 * M - 1].tolist()
    back = batch.unshifted(batch.shifted(values))
    assert (back[:, : M - 1] == 0).all()
    assert torch.equal(back[:, M - 1 :], values[:, M - 1 :])


# -- causality ---------------------------------------------------------------------------------------------------------


def test_outputs_never_depend_on_later_tokens_nor_on_other_documents(model):
    """By gradient: the embedding of each place reaches only outputs of its own document, at or after it."""
    batch = make_batch()
    h = model.decoder.embed(batch).detach().requires_grad_()
    decoder = model.decoder
    original, decoder.embed = decoder.embed, lambda _: h
    try:
        final = model(batch)
    finally:
        decoder.embed = original
    for row in range(2):
        for p in batch.valid[row].nonzero().flatten().tolist():
            (gradient,) = torch.autograd.grad(final[row, p].square().sum(), h, retain_graph=True)
            reaches = gradient.abs().sum(-1) > 0
            assert not reaches[1 - row].any()
            seen = set(reaches[row].nonzero().flatten().tolist())
            document = batch.document_at[row]
            own = {q for q in range(p + 1) if batch.valid[row, q] and document[q] == document[p]}
            assert seen == own


@pytest.mark.parametrize(("row", "chunk"), [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 2), (1, 4)])
def test_neighbours_of_a_chunk_reach_its_last_token_and_later_ones_of_its_document_alone(model, row, chunk):
    batch = make_batch()
    changed = changed_places(model, batch, with_other_neighbours(batch, row, chunk), row)
    ends = [p for p in range(N) if batch.valid[row, p] and batch.document_at[row, p] == batch.documents[row, chunk]]
    assert changed == {p for p in ends if p >= place(chunk, M - 1)}
    assert not changed_places(model, batch, with_other_neighbours(batch, row, chunk), 1 - row)


def test_the_gradient_of_the_neighbours_follows_the_same_rule(model):
    batch = make_batch()
    table = model.decoder.embedding
    kept = []
    hook = model.retrieval.encoder.register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0]))
    final = model(batch)
    hook.remove()
    (embedded,) = kept
    assert embedded.shape == (2, SLOTS, K, 2 * M, table.embedding_dim)
    for p in batch.valid[1].nonzero().flatten().tolist():
        (gradient,) = torch.autograd.grad(final[1, p].square().sum(), embedded, retain_graph=True)
        reached = gradient.abs().sum((-1, -2, -3)) > 0
        assert not reached[0].any()
        have = {0, 2, 3, 4, 5}
        assert set(reached[1].nonzero().flatten().tolist()) == {u for u in have if place(u, M - 1) <= p}


def test_the_first_tokens_of_a_document_see_no_neighbours(model):
    batch, without = make_batch(), make_batch().with_neighbours(0)
    with_them, plain = outputs(model, batch), outputs(model, without)
    for row, start in ((0, 0), (0, place(3)), (1, 0)):
        assert torch.equal(with_them[row, start : start + M - 1], plain[row, start : start + M - 1])
        assert not torch.equal(with_them[row, start + M - 1], plain[row, start + M - 1])


# -- missing neighbours ------------------------------------------------------------------------------------------------


def gradients(model: Retro, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.loss(batch).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_whatever_padded_slots_hold_outputs_and_gradients_are_the_same(model):
    batch = make_batch()
    columns = {
        "tokens": batch.tokens.flatten(1),
        "chunk_lengths": batch.lengths,
        "document_ids": batch.documents,
        "neighbour_tokens": batch.neighbour_tokens,
        "neighbour_lengths": batch.neighbour_lengths,
        "neighbour_ids": torch.where(batch.neighbour_lengths.sum(-1) > 0, 5, -1),
    }
    junk = {name: value.clone() for name, value in columns.items()}
    junk["tokens"][~batch.valid] = 60_000  # no token of this vocabulary
    places = torch.arange(M) >= batch.neighbour_lengths.unsqueeze(-1)
    junk["neighbour_tokens"][places] = 60_000
    junk["neighbour_lengths"][1, 1] = 3  # a missing neighbour is missing by its id, whatever its length says
    one, other = Batch.from_columns(columns, K), Batch.from_columns(junk, K)
    assert torch.equal(outputs(model, one), outputs(model, other))
    ours, theirs = gradients(model, one), gradients(model, other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_missing_neighbours_carry_exactly_zero_gradient(model):
    batch = make_batch()
    kept = []
    hook = model.retrieval.encoder.register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0]))
    loss = model.loss(batch)
    hook.remove()
    (gradient,) = torch.autograd.grad(loss, kept[0])
    assert torch.isfinite(gradient).all()
    assert (gradient[~batch.neighbour_keys] == 0).all()
    assert (gradient[1, 1] == 0).all()
    assert (gradient[1, 2, 1] == 0).all()
    assert (gradient[1, 2, 0] != 0).any()


def test_the_encoder_looks_at_the_valid_tokens_of_a_chunk_alone(model):
    batch = make_batch()
    h = torch.randn(2, N, 32, requires_grad=True)
    embedded = model.decoder.embedding(batch.neighbour_tokens).flatten(3, 4)
    encoded = model.retrieval.encoder(embedded, h, batch).unflatten(0, (2, SLOTS))
    (gradient,) = torch.autograd.grad(encoded[0, 2].square().sum(), h)  # chunk 2 of row 0 has two tokens
    reached = (gradient.abs().sum(-1) > 0).nonzero().tolist()
    assert reached == [[0, place(2)], [0, place(2, 1)]]


def test_where_all_neighbours_are_missing_it_is_the_plain_decoder(model):
    batch = make_batch()
    missing = replace(batch, neighbour_lengths=torch.zeros_like(batch.neighbour_lengths))
    assert torch.equal(outputs(model, missing), outputs(model, batch.with_neighbours(0)))
    found = gradients(model, missing)
    assert all((value == 0).all() for name, value in found.items() if name.startswith("retrieval."))


def test_without_neighbours_it_equals_a_model_that_has_no_retrieval(model):
    plain = Retro(make_config(retrieval=False)).eval()
    plain.decoder.load_state_dict(model.decoder.state_dict())
    batch = make_batch()
    assert torch.equal(outputs(plain, batch), outputs(model, batch.with_neighbours(0)))
    assert not torch.equal(outputs(plain, batch), outputs(model, batch))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_any_k_at_run_time(model, k):
    wide = make_batch(neighbours=5)
    assert torch.isfinite(outputs(model, wide.with_neighbours(k))).all()


def test_a_missing_neighbour_beside_a_found_one_changes_nothing(model):
    one = make_batch(neighbours=3)
    lengths = one.neighbour_lengths.clone()
    lengths[:, :, 2] = 0
    padded = Batch.made(one.tokens, one.lengths, one.documents, one.neighbour_tokens, lengths)
    assert torch.allclose(outputs(model, padded), outputs(model, one.with_neighbours(2)), atol=1e-5)


def test_the_neighbours_or_their_continuations_can_be_left_out(model):
    batch = make_batch()
    assert (batch.with_neighbours(continuations=False).neighbour_lengths[..., 1] == 0).all()
    assert (batch.with_neighbours(retrieved=False).neighbour_lengths[..., 0] == 0).all()
    whole = outputs(model, batch)
    for part in ({"continuations": False}, {"retrieved": False}):
        assert not torch.allclose(whole, outputs(model, batch.with_neighbours(**part)))


# -- the batch ---------------------------------------------------------------------------------------------------------


def test_a_row_alone_is_the_row_in_a_batch(model):
    batch = make_batch()
    together = outputs(model, batch)
    for row in range(2):
        alone = outputs(model, batch[row : row + 1])[0]
        assert torch.allclose(alone, together[row], atol=1e-5)


def test_empty_slots_behind_a_row_change_nothing(model):
    batch = make_batch()
    short = Batch(
        batch.tokens[:1, :5],
        batch.lengths[:1, :5],
        batch.documents[:1, :5],
        batch.neighbour_tokens[:1, :5],
        batch.neighbour_lengths[:1, :5],
    )
    assert torch.allclose(outputs(model, short)[0], outputs(model, batch)[0, : 5 * M], atol=1e-5)


def test_a_document_s_place_in_the_row_is_nothing_to_it(model):
    """Document 8 at the start of a row of its own: positions, masks and neighbours move along."""
    batch = make_batch()
    fields = (batch.tokens, batch.lengths, batch.documents, batch.neighbour_tokens, batch.neighbour_lengths)
    alone = Batch(*(field[:1, 3:5] for field in fields))
    assert torch.allclose(outputs(model, alone)[0], outputs(model, batch)[0, place(3) : place(5)], atol=1e-5)


def test_more_neighbours_than_the_rows_hold_are_refused():
    sample = {"neighbour_ids": torch.zeros(1, SLOTS, K, dtype=torch.int64)}
    with pytest.raises(InputError, match="3 neighbours a chunk are asked for; the rows hold 2"):
        Batch.from_columns(sample, 3)


# -- learning ----------------------------------------------------------------------------------------------------------


def test_it_learns_one_batch_by_heart():
    torch.manual_seed(0)
    model = Retro(make_config())
    batch = make_batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        optimizer.step()
    assert loss < 0.02


def test_it_learns_to_copy_from_its_neighbours_what_nothing_else_tells():
    """F of the only neighbour is the next chunk, both random: with retrieval the loss falls, without it cannot."""
    torch.manual_seed(0)
    model = Retro(make_config(layers=2))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)

    def rows(count: int) -> Batch:
        tokens = torch.randint(1, 50, (count, 2, M), generator=generator)
        near = torch.stack([tokens, tokens.roll(-1, 1)], dim=2).unsqueeze(2)
        full = torch.full((count, 2), M)
        return Batch.made(tokens, full, torch.zeros(count, 2), near, torch.full((count, 2, 1, 2), M))

    for _ in range(500):
        optimizer.zero_grad()
        model.loss(rows(32)).backward()
        optimizer.step()
    batch = rows(64)
    with torch.no_grad():
        second_chunk = batch.target_places[batch.predicts] >= M
        on = model.nats(batch)[second_chunk].mean()
        off = model.nats(batch.with_neighbours(0))[second_chunk].mean()
    assert on < 1.0
    assert off > 3.0


def test_rows_without_a_prediction_have_no_loss(model):
    batch = make_batch()
    empty = replace(batch, lengths=torch.zeros_like(batch.lengths), documents=torch.full_like(batch.documents, -1))
    assert model.loss(empty) == 0


# -- the config --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"), [(12, (6, 9, 12)), (24, (6, 9, 12, 15, 18, 21, 24)), (6, (3, 5)), (4, (2, 4)), (1, (1,))]
)
def test_cross_attention_is_every_third_layer_from_the_sixth_scaled_down_for_small_models(layers, expected):
    assert cross_attention_layers(layers) == expected


def test_a_config_survives_json_and_a_wrong_one_is_named():
    config = make_config(gated=True)
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
    for change, said in (
        ({"norm": "batch"}, "norm: Input should be 'rms' or 'layer'"),
        ({"positions": "learned"}, "learned positions need max_positions"),
        ({"key_value_heads": 3}, "heads 2 is no multiple of key_value_heads 3"),
        ({"retrieval": {**config.retrieval.model_dump(), "layers": (9,)}}, "there is no layer 9"),
    ):
        with pytest.raises(InputError, match=said):
            parse_model({**config.model_dump(), **change})
    with pytest.raises(InputError, match="there is no preset 'huge'; the presets are tiny, small"):
        ModelConfig.preset("huge", vocabulary=9, chunk_tokens=4)
