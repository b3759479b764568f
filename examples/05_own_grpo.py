"""GRPO in plain transformers: a gate skips answers that teach little, and what answers have in common is computed once.

pip install -e '.[trl]'
python examples/05_own_grpo.py               # a tiny model of random weights learns to answer with high digits
python examples/05_own_grpo.py --noise 0     # every answer is differentiated

The lines marked 1 to 4 are all that the gate and the shared tokens take. No downloads.
"""

import argparse

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import sparkjoy as sj
from sparkjoy.integrations.transformers import SharedTokens

parser = argparse.ArgumentParser()
parser.add_argument("--noise", type=float, default=0.3, help="what skipping may add to the gradient's own noise")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--prompts", type=int, default=8, help="of a step")
parser.add_argument("--answers", type=int, default=8, help="to each prompt")
options = parser.parse_args()

torch.manual_seed(0)
PAD, END, ASKS = 0, 1, 12  # and 2 to 11 are the digits
size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = Qwen2ForCausalLM(
    Qwen2Config(vocab_size=13, num_key_value_heads=2, pad_token_id=PAD, eos_token_id=END, bos_token_id=None, **size)
)
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)


def questions(count):
    """Prompts of one to three digits, padded on the left: tokens and mask, (count, 4)."""
    rows = [[2 + int(digit) for digit in str(number)] + [ASKS] for number in torch.randint(1000, (count,)).tolist()]
    ids = torch.tensor([[PAD] * (4 - len(row)) + row for row in rows])
    return ids, (ids != PAD).long()


def mean_digit(answers, valid):
    """The reward, from 0 to 1."""
    digits = torch.where((answers >= 2) & (answers < ASKS) & valid, answers - 2, 0)
    return digits.sum(dim=1) / (9 * valid.sum(dim=1))


shared = SharedTokens(model)  # 1
gate = sj.UnbiasedGate(options.noise) if options.noise else None
step = sj.GatedBackward(gate, micro_batch_size=32, group_by="prompt")  # 2


def log_prob_fn(rows):
    return shared.log_probs(rows["ids"], rows["mask"], rows["scored"])  # 3


for number in range(1, options.steps + 1):
    prompts, mask = (rows.repeat_interleave(options.answers, dim=0) for rows in questions(options.prompts))
    ids = shared.generate(prompts, mask, do_sample=True, max_new_tokens=8)  # 4
    answers = ids[:, prompts.shape[1] :]
    ends = answers == END
    valid = ends.cumsum(dim=1) - ends.long() == 0  # up to the first end
    rewards = mean_digit(answers, valid)
    advantages = sj.group_mean_advantage(rewards, options.answers)
    scored = torch.cat([torch.zeros_like(mask), valid], dim=1)
    rows = {"ids": ids, "mask": torch.cat([mask, valid], dim=1), "scored": scored, "prompt": prompts}

    report = step(log_prob_fn, rows, advantages, mask=scored)
    if report.kept:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if number % 10 == 0:
        print(f"step {number}: reward {rewards.mean():.2f}, kept {report.kept} of {report.total} answers", flush=True)
print(f"tokens computed: {shared.distinct_tokens:,} of {shared.padded_tokens:,}")
