import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import CausalModel

from sparkjoy.prefix_tree import UNSCORED, fold, scorable, work

MODEL = CausalModel()


@st.composite
def rows(draw):
    """Rows of few kinds of tokens, which share much: equal ones, prefixes of one another, all unlike, a single one."""
    count, width, kinds = draw(st.integers(1, 7)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    drawn = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    ids, columns = torch.randint(kinds, (count, width), generator=drawn), torch.arange(width)
    if draw(st.booleans()):
        ids[:, : width // 2] = ids[0, : width // 2].clone()
    lengths = torch.randint(1, width + 1, (count, 1), generator=drawn)
    mask = draw(st.sampled_from(["none", "left", "right", "holes"]))
    mask = {
        "none": torch.ones(count, width),
        "left": columns >= width - lengths,
        "right": columns < lengths,
        "holes": torch.rand(count, width, generator=drawn) < 0.7,
    }[mask]
    scored = draw(st.sampled_from([columns >= width // 2, columns >= 0, columns % 2 == 1, columns < 0]))
    return ids, mask.long(), scored.expand(count, -1)


@settings(max_examples=500)
@given(rows(), st.sampled_from([torch.inf, 30.0, 3.0]), st.sampled_from([None, 1, 3]), st.booleans())
def test_log_probs_of_a_tree_are_those_of_its_rows(drawn, balance, window, by_mask):
    ids, mask, scored = drawn
    positions = (mask.cumsum(1) - 1).clamp(min=0) if by_mask else None
    tree = fold(ids, mask, scored, positions=positions, balance=balance)
    of_nodes = MODEL(tree.ids, tree.positions, tree.sees(window)).gather(2, tree.labels.clamp(min=0).unsqueeze(2))
    expected = MODEL.of_rows(ids, mask, window, positions).where(scorable(mask, scored), 0)
    assert torch.allclose(tree.unfold(of_nodes.squeeze(2)), expected, atol=1e-12)
    nodes = (tree.ends > 0).sum().item()
    assert tree.shares.sum().item() == pytest.approx(nodes)
    assert len(set(prefixes(ids, mask, scored))) <= nodes


def prefixes(ids, mask, scored):
    """What a node stands for, of every row: the tokens up to it and the one to score after it."""
    for row, valid, wanted in zip(ids.tolist(), mask.tolist(), scorable(mask, scored).tolist(), strict=True):
        last = max((column for column, is_wanted in enumerate(wanted) if is_wanted), default=0)
        seen = [token if is_valid else None for token, is_valid in zip(row, valid, strict=True)]
        for column in range(last):
            if valid[column] or wanted[column + 1]:
                yield (*seen[: column + 1], row[column], (row[column + 1] if wanted[column + 1] else None))


def test_every_distinct_prefix_is_one_node():
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4], [1, 9, 9, 9]])
    tree = fold(ids, torch.ones(4, 4), torch.ones(4, 4))
    # 1 before 2 and before 9; 2; 3 before 4 and before 5; 9 before 9; 9 before 9
    assert tree.ids.tolist() == [[1, 2, 3, 3, 1, 9, 9]]
    assert tree.labels.tolist() == [[2, 3, 4, 5, 9, 9, 9]]
    assert tree.positions.tolist() == [[0, 1, 2, 2, 0, 1, 2]]
    assert tree.shares.tolist() == pytest.approx([1 / 3 + 1 / 3 + 1 / 2, 1 / 3 + 1 / 3 + 1, 1 / 3 + 1 / 3 + 1 / 2, 3])


def test_a_large_tree_is_split_where_attention_would_cost_more_than_it_saves():
    prompt, answers = torch.arange(40).expand(8, -1), 50 + torch.arange(8 * 40).view(8, 40)
    ids, mask = torch.cat([prompt, answers], dim=1), torch.ones(8, 80)
    scored = torch.arange(80).ge(40).expand(8, -1)
    shapes = [tuple(fold(ids, mask, scored, balance=balance).ids.shape) for balance in (torch.inf, 200.0, 30.0)]
    # The prompt but its last token once, that for each answer, and each answer but its last token; then in 4 trees of 2
    # answers; then each row by itself.
    assert shapes == [(1, 39 + 8 * 40), (4, 39 + 2 * 40), (8, 79)]


def test_a_batch_without_a_token_to_score_still_has_a_place():
    tree = fold(torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3), torch.zeros(2, 3))
    assert tree.ids.numel() >= 1
    assert tree.labels.eq(UNSCORED).all()
    assert tree.unfold(torch.ones(tree.ids.shape)).tolist() == [[0, 0, 0]] * 2


def test_work_grows_with_the_square_of_the_length():
    assert work((2, 100), 100.0) == 400
