import pytest
import torch
from plain_sampling import plain_sample

from sparkjoy_lab.policies.transformer import Transformer


def make(vocab_size=3, positions=12, **sizes):
    torch.manual_seed(0)
    return Transformer(vocab_size, positions, **sizes)


def draw(policy, prompts, answers_per_prompt, answer_length, lengths=None):
    """Rows of sampled answers and the log-probs they were drawn with."""
    generator = torch.Generator().manual_seed(0)
    answers, log_probs = policy.sample(prompts, answers_per_prompt, answer_length, generator, lengths)
    rows = {"prompts": prompts.repeat_interleave(answers_per_prompt, 0), "answers": answers}
    if lengths is not None:
        rows["prompt_lengths"] = lengths.repeat_interleave(answers_per_prompt)
    return rows, log_probs


SIZES = [
    {},
    {"layers": 1, "width": 8, "heads": 1, "feed_forward": 4},
    {"layers": 2, "width": 48, "heads": 6, "feed_forward": 96},
]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("prompt_length", "answer_length"), [(6, 7), (1, 5), (4, 1), (1, 1)])
@pytest.mark.parametrize("sizes", SIZES)
def test_sampler_knows_the_log_probs_of_a_full_forward(generator, sizes, prompt_length, answer_length, ragged):
    policy = make(**sizes)
    prompts = torch.randint(3, (5, prompt_length), generator=generator)
    lengths = torch.randint(1, prompt_length + 1, (5,), generator=generator) if ragged else None
    rows, log_probs = draw(policy, prompts, 4, answer_length, lengths)
    assert log_probs.shape == rows["answers"].shape == (20, answer_length)
    assert not log_probs.requires_grad
    torch.testing.assert_close(log_probs, policy.log_probs(rows), atol=1e-5, rtol=0)
    policy.log_probs(rows).sum().backward()  # a graph can be built on sampled answers


@pytest.mark.parametrize("groups", [[0] * 8, [7, 7, 7, 2, 2, 2, 2, 2], [1, 0, 1, 0, 0, 1, 0, 0], [3] * 7 + [1]])
@pytest.mark.parametrize(("prompt_length", "answer_length"), [(6, 7), (1, 5), (4, 1)])
def test_reading_a_shared_prompt_once_changes_no_gradient(generator, groups, prompt_length, answer_length):
    policy = make(layers=2).double()
    index = torch.tensor(groups)
    prompts = torch.randint(3, (8, prompt_length), generator=generator)[index]
    rows = {"prompts": prompts, "answers": torch.randint(3, (8, answer_length), generator=generator)}
    weight = torch.randn(8, answer_length, generator=generator, dtype=torch.double)
    plain, shared = (policy.log_probs(given) for given in (rows, {**rows, "prompt_index": index}))
    torch.testing.assert_close(shared, plain, atol=1e-12, rtol=0)
    parameters = list(policy.parameters())
    for one, other in zip(
        torch.autograd.grad((weight * plain).sum(), parameters, allow_unused=True),
        torch.autograd.grad((weight * shared).sum(), parameters, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


def test_padding_changes_nothing(generator):
    policy = make()
    lengths = torch.tensor([1, 3, 5])
    clean = torch.randint(3, (3, 5), generator=generator)
    junk = clean.where(torch.arange(5) < lengths.unsqueeze(1), torch.tensor(-99))
    rows, log_probs = draw(policy, clean, 2, 4, lengths)
    junk_rows, junk_log_probs = draw(policy, junk, 2, 4, lengths)
    assert torch.equal(rows["answers"], junk_rows["answers"])
    assert torch.equal(log_probs, junk_log_probs)
    assert torch.equal(policy.log_probs(rows), policy.log_probs(junk_rows))
    for index, length in enumerate(lengths.tolist()):
        alone = {"prompts": clean[index : index + 1, :length], "answers": rows["answers"][2 * index : 2 * index + 1]}
        torch.testing.assert_close(policy.log_probs(alone)[0], log_probs[2 * index], atol=1e-5, rtol=0)


def test_later_tokens_do_not_change_earlier_log_probs(generator):
    policy = make()
    rows, _ = draw(policy, torch.randint(3, (4, 5), generator=generator), 1, 6)
    before = policy.log_probs(rows)
    for position in range(6):
        answers = rows["answers"].clone()
        answers[:, position] = (answers[:, position] + 1) % 3
        after = policy.log_probs({**rows, "answers": answers})
        torch.testing.assert_close(after[:, :position], before[:, :position], atol=1e-6, rtol=0)
        assert not torch.isclose(after[:, position:], before[:, position:], atol=1e-6).all(dim=1).any()


def test_every_answer_has_its_probability(generator):
    policy = make(vocab_size=2, layers=1, width=8, heads=2, feed_forward=8)
    with torch.no_grad():
        policy.head.weight.mul_(4)  # far from uniform
    prompts = torch.tensor([[0, 1, 1]])
    every = torch.cartesian_prod(*[torch.arange(2)] * 3)
    expected = policy.log_probs({"prompts": prompts.expand(8, 3), "answers": every}).sum(1).exp().detach()
    assert expected.sum().item() == pytest.approx(1, abs=1e-5)
    draws = 20_000
    for sample in (policy.sample, lambda *arguments: plain_sample(policy, *arguments)):
        answers, _ = sample(prompts, draws, 3, generator)
        frequencies = torch.bincount(answers @ torch.tensor([4, 2, 1]), minlength=8) / draws
        error = (expected * (1 - expected) / draws).sqrt()
        assert ((frequencies - expected).abs() < 4 * error).all()


def test_plain_sampling_knows_the_same_log_probs(generator):
    policy = make()
    prompts = torch.randint(3, (4, 5), generator=generator)
    answers, log_probs = plain_sample(policy, prompts, 3, 6, generator)
    rows = {"prompts": prompts.repeat_interleave(3, 0), "answers": answers}
    torch.testing.assert_close(log_probs, policy.log_probs(rows).detach(), atol=1e-5, rtol=0)


def test_answers_depend_on_the_prompt_and_differ(generator):
    policy = make()
    rows, _ = draw(policy, torch.randint(3, (4, 5), generator=generator), 5, 6)
    assert len(rows["answers"].unique(dim=0)) > 10


def test_too_long_a_sequence_is_refused():
    policy = make(positions=5)
    prompts, answers = torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"6 tokens to read.* at most 5 positions"):
        policy.log_probs({"prompts": prompts, "answers": answers})
    with pytest.raises(ValueError, match="at most 5 positions"):
        policy.sample(prompts, 1, 3)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="layers is 0"):
        Transformer(2, 5, layers=0)
    with pytest.raises(ValueError, match="width is 10, which 4 heads do not divide"):
        Transformer(2, 5, width=10)
