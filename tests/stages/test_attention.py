"""Attention over spans equals attention with the corresponding mask."""

import torch

from stages.attention import attend


def test_spans_are_the_mask_they_stand_for():
    query, key, value = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    spans = [(slice(0, 2), [slice(0, 2)]), (slice(2, 5), [slice(0, 5)]), (slice(5, 9), [slice(0, 2), slice(5, 9)])]
    mask = torch.zeros(9, 9, dtype=torch.bool)
    for queries, seen in spans:
        for part in seen:
            mask[queries, part] = True
    torch.testing.assert_close(attend(query, key, value, spans), attend(query, key, value, mask))


def test_one_span_is_not_copied(monkeypatch):
    """Keys and values of a single run are views; those of two runs are concatenated, and so are the outputs."""
    query, key, value = torch.randn(3, 1, 2, 6, 4).unbind(0)
    joined, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts, dim: (joined.append(len(parts)), cat(parts, dim=dim))[1])
    attend(query, key, value, [(slice(0, 2), [slice(0, 2)]), (slice(2, 6), [slice(0, 6)])])
    assert joined == [2]
    attend(query, key, value, [(slice(0, 6), [slice(0, 2), slice(4, 6)])])
    assert joined == [2, 2, 2, 1]
