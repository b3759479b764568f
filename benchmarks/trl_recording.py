"""What recording log-probs costs while transformers generates: sampling with and without it, in turns.

python benchmarks/trl_recording.py                      # SmolLM2-135M, 64 answers of 5 tokens to 8 prompts
python benchmarks/trl_recording.py --model NAME --task sentences
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from sparkjoy.integrations.language_model import pretrained
from sparkjoy.integrations.trl.recording import recording
from sparkjoy.lab.studies.language_tasks import TASKS


def main() -> None:
    """Print medians over rounds, and the recorder's own part of sampling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--task", choices=list(TASKS), default="sums")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = pretrained(options.model)
    task = TASKS[options.task]
    prompts = [row["prompt"] for row in task.problems()[:8] for _ in range(8)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    width = inputs["input_ids"].shape[1]
    seconds: dict[str, list[float]] = {"sampling": [], "sampling, recorded": [], "the log-probs handed over": []}
    for number in range(-1, options.rounds):
        for name in ("sampling", "sampling, recorded"):
            torch.manual_seed(number + 1)
            start = time.process_time()
            with recording(model, 1.0) as recorder, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                if name == "sampling":
                    recorder.see = lambda ids, logits: None  # type: ignore[method-assign]
                ids = model.generate(**inputs, max_new_tokens=task.max_tokens, do_sample=True)
            middle = time.process_time()
            if number >= 0:
                seconds[name].append(middle - start)
            if name != "sampling":
                answers = [row[: int((row != tokenizer.pad_token_id).sum())].tolist() for row in ids[:, width:]]
                if recorder.log_probs(answers) is None:
                    raise RuntimeError("nothing was recorded")
                if number >= 0:
                    seconds["the log-probs handed over"].append(time.process_time() - middle)
    for name, values in seconds.items():
        print(f"{name:28}{statistics.median(values):8.3f} s   (least {min(values):.3f})")


if __name__ == "__main__":
    main()
