"""The `sparkjoy` command: train, compare, study."""

from __future__ import annotations

import os
import sys

HELP = """usage: sparkjoy COMMAND [flags]

  sparkjoy train mnist      train one policy: sparkjoy train mnist --method kondo --rate 0.03 --out out/run
  sparkjoy train reversal   the same on token reversal with a transformer
  sparkjoy pareto mnist     train every method at every rate, and draw quality against cost
  sparkjoy pareto reversal  the same on token reversal
  sparkjoy study scores     the same rate by other scores than delight, under two baselines
  sparkjoy study screening  cheaper screeners than a forward pass, noise on delight, an unbiased gate
  sparkjoy study scaling    the longest prompt each method learns to reverse within a budget
  sparkjoy study gain       what the gate saves a step as problems grow and backward passes get dearer
  sparkjoy study tokens     gating single tokens against gating whole answers
  sparkjoy study bandit     the papers' bandit theory, checked number by number
  sparkjoy bench            seconds and peak memory of one step: dense, gated, and what else one could do
  sparkjoy frontier         what gating saves, and costs, on your own model, prompts and reward

Each takes --help. Results are a folder: config.json, records.jsonl, summary.json and figures. train, pareto, study
scores, screening and scaling go on from the last checkpoint when started again with the same --out."""


def main() -> None:
    """Run one command; exit status 2 and one line for what the user got wrong."""
    try:
        from sparkjoy import commands
    except ImportError as error:
        print(
            f'sparkjoy: {error.name} is missing; the command line needs: pip install "sparkjoy[cli]"', file=sys.stderr
        )
        raise SystemExit(2) from None
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return
    if arguments == ["--version"]:
        from sparkjoy import __version__

        print(f"sparkjoy {__version__}")
        return
    try:
        commands.run(arguments)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":  # under torchrun the first process speaks for all
            print(f"sparkjoy: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("sparkjoy: interrupted; finished work is in --out", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
