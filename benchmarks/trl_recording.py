"""What recording log-probs costs while transformers generates: sampling with and without it, in turns.

python benchmarks/trl_recording.py                      # SmolLM2-135M, 64 answers of 5 tokens to 8 prompts
python benchmarks/trl_recording.py --model NAME --task sentences
"""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import torch

from sparkjoy.integrations.sampling import recording
from sparkjoy_lab.bench.timing import collect, machine, median, options, print_table, turns
from sparkjoy_lab.language_model import pretrained
from sparkjoy_lab.studies.language_tasks import TASKS
from sparkjoy_lab.training.tracking import write_json


def main() -> None:
    """Print medians over rounds, and the recorder's own part of sampling."""
    parser = options(__doc__, rounds=5)
    parser.add_argument("--model")
    parser.add_argument("--task", choices=list(TASKS), default="sums")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = pretrained(given.model)
    task = TASKS[given.task]
    prompts = [row["prompt"] for row in task.problems()[:8] for _ in range(8)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    width = inputs["input_ids"].shape[1]

    def sampled(recorded: bool) -> float:
        """Sample; returns the seconds that handing the log-probs over took of it."""
        with recording(model, 1.0) as recorder, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            if not recorded:
                recorder.see = lambda ids, logits: None  # type: ignore[method-assign]  # to record nothing
            ids = model.generate(**inputs, max_new_tokens=task.max_tokens, do_sample=True)
        if not recorded:
            return 0.0
        start = time.process_time()
        answers = [row[: int((row != tokenizer.pad_token_id).sum())].tolist() for row in ids[:, width:]]
        if recorder.log_probs(answers) is None:
            raise RuntimeError("nothing was recorded")
        return time.process_time() - start

    arms = {"sampling": partial(sampled, False), "sampling, recorded": partial(sampled, True)}
    taken = turns(
        arms, given.rounds, warm_up=1, clock=time.process_time, before=lambda number, _: torch.manual_seed(number + 1)
    )
    seconds, handed_over = collect(taken)
    parts = {name: np.subtract(seconds[name], handed_over[name]).tolist() for name in arms}
    parts["the log-probs handed over"] = handed_over["sampling, recorded"]
    figures = {name: {"median": median(values), "least": min(values)} for name, values in parts.items()}
    print_table("CPU seconds", figures, dict.fromkeys(("median", "least"), "8.3f"))
    if given.out is not None:
        write_json(given.out, {"setup": machine("cpu", "trl", "transformers"), "seconds": figures})


if __name__ == "__main__":
    main()
