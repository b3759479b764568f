"""A model of a few thousand parameters, its tokenizer and its prompts, on disk as verl wants them; and the reward."""

import sys
from pathlib import Path

import pandas
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

TOKENS = ["<|endoftext|>", "<|im_end|>", "Ċ", *"abcdefghijklmnopqrstuvwxyz"]  # Ċ: a line's end, which verl asks for


def write(folder):
    folder = Path(folder)
    tokenizer = Qwen2Tokenizer({token: place for place, token in enumerate(TOKENS)}, merges=[])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(TOKENS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    prompts = [TOKENS[3 + number % 26] + TOKENS[3 + number * 7 % 26] for number in range(64)]
    rows = [
        {
            "data_source": "stub",
            "prompt": [{"role": "user", "content": prompt}],
            "reward_model": {"style": "rule", "ground_truth": "g"},
            "extra_info": {"index": place},
        }
        for place, prompt in enumerate(prompts)
    ]
    for name in ("train", "test"):
        pandas.DataFrame(rows).to_parquet(folder / f"{name}.parquet")


def share_of_letter(data_source, solution_str, ground_truth, extra_info=None, **_):
    """The reward."""
    return solution_str.count(ground_truth) / max(len(solution_str), 1)


if __name__ == "__main__":
    write(sys.argv[1])
