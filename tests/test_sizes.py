"""Sizes, times and counts as people write them."""

import pytest

from retrodb.sizes import count_of, duration_text, parse_duration, parse_size


def test_a_size_is_a_number_of_bytes() -> None:
    assert [parse_size(text) for text in ("8GB", "512MiB", "1.5k", 7)] == [8 * 10**9, 512 << 20, 1500, 7]
    for wrong in ("", "GB", "8 parsecs", "-1"):
        with pytest.raises(ValueError, match="is not a size; write it as 8GB or 512MiB"):
            parse_size(wrong)


def test_a_duration_has_its_unit() -> None:
    assert [parse_duration(text) for text in ("30s", "10m", "10min", "1.5h", "2d", 7)] == [
        30,
        600,
        600,
        5400,
        172800,
        7,
    ]
    for wrong in ("", "10", "-3s", "5 parsecs", "1e3s"):
        with pytest.raises(ValueError, match="is not a duration; write it as 30s, 10m or 2h"):
            parse_duration(wrong)


def test_a_duration_is_shown_as_it_is_read() -> None:
    texts = ["0.5s", "45s", "1.5m", "100s", "10m", "1.5h", "2d"]
    assert [duration_text(parse_duration(text)) for text in texts] == texts


def test_what_is_counted_is_one_or_many() -> None:
    assert [count_of(number, "shard") for number in (0, 1, 2, 1234)] == [
        "0 shards",
        "1 shard",
        "2 shards",
        "1,234 shards",
    ]
    assert [count_of(number, "query", "queries") for number in (1, 2)] == ["1 query", "2 queries"]
    assert [count_of(number, "shard holds", "shards hold") for number in (1, 2)] == ["1 shard holds", "2 shards hold"]
