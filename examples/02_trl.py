"""TRL's GRPOTrainer, gated: a tiny model of random weights learns to answer with high digits. No downloads.

    pip install -e '.[trl]'
    python examples/02_trl.py
    python examples/02_trl.py --model NAME     # a checkpoint of yours, its tokenizer, a reward for short answers

Against plain TRL, three lines change and one is new:

    -from trl import GRPOConfig, GRPOTrainer
    +from sparkjoy.integrations.trl import KondoGRPOConfig, KondoGRPOTrainer
    -    config = GRPOConfig(
    +    config = KondoGRPOConfig(
    +        gate_noise=options.noise,
    -    trainer = GRPOTrainer(
    +    trainer = KondoGRPOTrainer(
"""

import argparse
import tempfile

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from sparkjoy.integrations.trl import KondoGRPOConfig, KondoGRPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="name or folder of a checkpoint; default: a tiny model made on the spot")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--noise", type=float, default=0.3, help="what skipping may add to the gradient's own noise")
options = parser.parse_args()

if options.model is None:
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *"0123456789?"])}
    one_character_a_token = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    one_character_a_token.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=one_character_a_token, pad_token="<pad>", eos_token="<eos>")
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
else:
    tokenizer, model = None, options.model  # TRL loads both by name

prompts = Dataset.from_dict({"prompt": [f"{number}?" for number in range(256)]})


def reward(completions, **_):
    """Verifiable: the mean digit, 0 to 1, of up to 8; for a checkpoint, how short the answer is."""
    if options.model is not None:
        return [-len(completion) / 100 for completion in completions]
    return [sum(map(int, filter(str.isdigit, completion))) / 72 for completion in completions]


with tempfile.TemporaryDirectory() as folder:
    config = KondoGRPOConfig(
        gate_noise=options.noise,  # as many get a backward pass as that takes; the expected gradient is TRL's
        output_dir=folder,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=4,
        num_generations=8,
        max_completion_length=8,
        learning_rate=5e-3,
        max_steps=options.steps,
        logging_steps=options.steps // 4 or 1,
        save_strategy="no",
        report_to="none",
        bf16=options.model is not None,
        use_cpu=options.model is None,
        disable_tqdm=True,
    )
    trainer = KondoGRPOTrainer(
        model=model, reward_funcs=reward, args=config, train_dataset=prompts, processing_class=tokenizer
    )
    trainer.train()

print("step  reward  kept  noise  passes (of 4)")
for entry in trainer.state.log_history:
    if "reward" in entry:
        kept, noise, passes = (entry.get(f"gate/{name}", 0) for name in ("kept_rate", "noise", "micro_steps"))
        print(f"{entry['step']:4}  {entry['reward']:6.3f}  {kept:4.0%}  {noise:5.2f}  {passes:.1f}")
