"""Tasks that a small language model half knows: prompts to go on from, and a reward that a program checks."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

Problem = dict[str, str]
"""A row of the data set: "prompt" and "answer", which is empty where there is not one only."""
SHUFFLED_BY = 20_000
"""Seed that parts training from held-out problems, the same in every run."""


@dataclass(frozen=True)
class LanguageTask:
    """What is asked and what it is worth.

    Args:
        problems: `() -> ` all of them, the held-out ones first.
        score: `(completion, problem) -> ` a reward from 0 to 1.
        max_tokens: of an answer, which a newline ends earlier.
        target: mean score of greedy answers that counts as learnt.
    """

    problems: Callable[[], list[Problem]]
    score: Callable[[str, Problem], float]
    max_tokens: int
    target: float

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **_: object) -> list[float]:
        """TRL's reward function."""
        rows = zip(completions, prompts, answer, strict=True)
        return [self.score(text, {"prompt": prompt, "answer": wanted}) for text, prompt, wanted in rows]


def sums() -> list[Problem]:
    """Sums of two numbers of two digits, after one example."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(SHUFFLED_BY).shuffle(pairs)
    return [{"prompt": f"12 + 35 = 47\n{a} + {b} =", "answer": str(a + b)} for a, b in pairs]


def chains() -> list[Problem]:
    """`chain_sum` of reasoning-gym: three numbers of one digit, after one example. Prompts are eight times the answers.

    Raises:
        ModuleNotFoundError: reasoning-gym is not installed.
    """
    import reasoning_gym

    drawn = reasoning_gym.create_dataset(
        "chain_sum", min_terms=3, max_terms=3, min_digits=1, max_digits=1, size=12_000, seed=SHUFFLED_BY
    )
    answers = {entry["question"]: entry["answer"] for entry in drawn}  # each question once
    (question, answer), *others = answers.items()
    return [{"prompt": f"{question} {answer}\n{other} ".rstrip(), "answer": of_other} for other, of_other in others]


def largest() -> list[Problem]:
    """The largest of five numbers of two digits, after one example."""
    source = random.Random(SHUFFLED_BY)
    prompts: dict[str, str] = {}
    while len(prompts) < 4_500:
        numbers = source.sample(range(10, 100), 5)
        prompts[f"31 84 12 57 40 -> 84\n{' '.join(map(str, numbers))} ->"] = str(max(numbers))
    return [{"prompt": prompt, "answer": answer} for prompt, answer in prompts.items()]


def one_more() -> list[Problem]:
    """Twelve numbers of one digit, each to be answered with the next one, after one example."""
    source = random.Random(SHUFFLED_BY)
    prompts: dict[str, str] = {}
    example = "3 7 1 8 5 2 9 4 6 0 5 3\nresult: 4 8 2 9 6 3 10 5 7 1 6 4"
    while len(prompts) < 4_500:
        numbers = [source.randrange(10) for _ in range(12)]
        prompt = f"numbers: {example}\nnumbers: {' '.join(map(str, numbers))}\nresult:"
        prompts[prompt] = " ".join(str(number + 1) for number in numbers)
    return [{"prompt": prompt, "answer": answer} for prompt, answer in prompts.items()]


def right_places(completion: str, problem: Problem) -> float:
    """The part of the answer's numbers that stand in their place on the first line."""
    given, wanted = completion.strip().partition("\n")[0].split(), problem["answer"].split()
    return sum(map(str.__eq__, given, wanted)) / len(wanted)


def right_number(completion: str, problem: Problem) -> float:
    """1 if the first number is the answer."""
    number = re.search(r"-?\d+", completion)
    return float(number is not None and number[0] == problem["answer"])


NOUNS = "cat river garden teacher winter bread music train morning forest doctor city bird storm friend island"
VERBS = "finds loses follows fears loves paints hides watches forgets carries"


def sentences() -> list[Problem]:
    """Stories to go on from, told that no word may have an "e"."""
    nouns = NOUNS.split()
    starts = [f"A {a} {verb} a {b}" for a in nouns for b in nouns for verb in VERBS.split() if a != b]
    random.Random(SHUFFLED_BY).shuffle(starts)
    return [{"prompt": f"A short story without the letter e: {start}, and", "answer": ""} for start in starts]


WORDS = 20


def without_e(completion: str, problem: Problem) -> float:
    """c/n · min(1, c/20), where c of the n different words have no "e": few words, or one repeated, earn little."""
    words = set(re.findall(r"[a-z]{2,}", completion.lower()))
    clean = sum("e" not in word for word in words)
    return clean / max(1, len(words)) * min(1.0, clean / WORDS)


TASKS = {
    "sums": LanguageTask(sums, right_number, max_tokens=5, target=0.6),
    "sentences": LanguageTask(sentences, without_e, max_tokens=40, target=0.5),
    "largest": LanguageTask(largest, right_number, max_tokens=5, target=0.6),
    "one more": LanguageTask(one_more, right_places, max_tokens=32, target=0.5),
    "gym": LanguageTask(chains, right_number, max_tokens=5, target=0.6),
}
