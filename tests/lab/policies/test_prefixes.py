import pytest
import torch

from sparkjoy_lab.policies.prefixes import SharedPrefixes
from sparkjoy_lab.policies.transformer import Transformer

CPU = torch.device("cpu")


@pytest.mark.parametrize("sure", [0.5, 0.8, 0.9, 0.99])
@pytest.mark.parametrize(("prompts", "answers"), [(1, 1), (1, 8), (4, 1), (3, 2), (3, 5), (6, 10)])
def test_columns_are_the_distinct_prefixes(prompts, answers, sure):
    generator = torch.Generator().manual_seed(0)
    shared = SharedPrefixes(prompts, answers, CPU)
    tokens = (torch.rand(prompts * answers, 12, generator=generator) > sure).long()
    contents = [(prompt,) for prompt in range(prompts)]  # what each column has read
    for step in range(12):
        old = shared.split(tokens[:, step])
        if old is not None:
            contents = [contents[column] for column in old.tolist()]
        contents = [
            (*content, tokens[leader, step].item())
            for content, leader in zip(contents, shared.leaders.tolist(), strict=True)
        ]
        own = [(row // answers, *tokens[row, : step + 1].tolist()) for row in range(prompts * answers)]
        assert [contents[column] for column in shared.columns.tolist()] == own
        if len(contents) < prompts * answers:
            assert len(set(contents)) == len(contents)  # none is read twice
        else:
            assert shared.columns.tolist() == list(range(prompts * answers))


def make(sharpness):
    torch.manual_seed(0)
    policy = Transformer(3, positions=16, layers=2, width=16, heads=2, feed_forward=16)
    with torch.no_grad():
        policy.head.weight.mul_(sharpness)
    return policy


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("sharpness", [0.1, 4, 10, 30, 300])
def test_a_shared_prefix_changes_no_answer(monkeypatch, sharpness, ragged):
    policy = make(sharpness).double()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, (6, 7), generator=generator)
    lengths = torch.randint(1, 8, (6,), generator=generator) if ragged else None
    counts = []

    def sample():
        return policy.sample(prompts, 8, 10, torch.Generator().manual_seed(1), lengths)

    split = SharedPrefixes.split
    monkeypatch.setattr(
        SharedPrefixes, "split", lambda self, *args: (split(self, *args), counts.append(len(self.leaders)))[0]
    )
    answers, log_probs = sample()
    monkeypatch.setattr(SharedPrefixes, "split", lambda self, tokens: None)
    monkeypatch.setattr(SharedPrefixes, "__init__", every_answer_on_its_own)
    alone, alone_log_probs = sample()
    assert torch.equal(answers, alone)
    torch.testing.assert_close(log_probs, alone_log_probs, atol=1e-12, rtol=0)
    if sharpness == 300:
        assert counts[-1] < 30  # of 48
    if sharpness == 0.1:
        assert counts[-1] == 48


def every_answer_on_its_own(self, prompts, answers_per_prompt, device):
    self.copies = answers_per_prompt
    self.columns = self.leaders = torch.arange(prompts * answers_per_prompt)


@pytest.mark.parametrize("seed", range(20))
def test_recorded_log_probs_are_right_however_prefixes_part(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    policy = make(draw(1, 30))
    prompts = torch.randint(3, (draw(1, 5), draw(1, 8)), generator=generator)
    answers_per_prompt = draw(1, 7)
    answers, log_probs = policy.sample(prompts, answers_per_prompt, draw(1, 9), generator)
    rows = {"prompts": prompts.repeat_interleave(answers_per_prompt, 0), "answers": answers}
    torch.testing.assert_close(log_probs, policy.log_probs(rows).detach(), atol=1e-5, rtol=0)
