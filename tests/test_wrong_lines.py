"""Wrong command lines by the hundred: each one line, status 2, and nothing left behind."""

import shlex
import sys

import pytest

from sparkjoy_lab import cli

WRONG = {
    "train mnist": """
        --learning-rate 1e30 --steps 20 ; --learning-rate nan ; --learning-rate inf ; --learning-rate -1 ;
        --learning-rate 1e300 --steps 20 ; --method pg --learning-rate 1e30 --steps 20 ;
        --method dg --learning-rate 1e30 --steps 20 ; --method uniform --learning-rate 1e30 --steps 20 ;
        --method ppo --learning-rate 1e30 --steps 20 ; --method grpo --learning-rate 1e30 --steps 20 ;
        --method pmpo --learning-rate 1e30 --steps 20 ; --method unbiased --learning-rate 1e30 --steps 20 ;
        --screen draft --draft-learning-rate 1e30 --steps 20 ; --draft-learning-rate nan ; --rate nan ;
        --price nan ; --temperature nan --price 0 ; --temperature inf --price 0 ; --negative-share nan ;
        --alpha nan ; --alpha inf --score additive ; --clip nan ; --clip -1 --method ppo ; --until-error nan ;
        --target-error nan ; --verify nan ; --verify inf ; --recall-floor nan ;
        --recall-floor 2 --screen draft ; --noise nan ; --label-noise nan ; --batch-size 1000000000000 ;
        --batch-size 100000000 ; --hidden 1000000 ; --hidden 100000000000000000000000 ; --threads 100000 ;
        --threads 0 ; --threads -1 ; --steps 100000000000000000000000 ; --steps -5 ;
        --evaluate-every 100000000000000000000000 ; --micro-batch-size 0 ; --micro-batch-size -3 ;
        --micro-batch-size 100000000000000000000000 ; --epochs 100000000000000000000000 ; --epochs 0 ;
        --seed 100000000000000000000000 ; --seed 1.5 ; --seed -1000000000000000000000 ;
        --refresh-every 0 --screen stale ; --refresh-every -1 --screen stale ; --max-age -1 --screen cached ;
        --lesson-every 0 --screen draft ; --exit-layers 0 --screen early-exit ; --screen early-exit ;
        --data "" ; --data= ; --data /no/such ; --data ~nosuchuser/x ; --data openml2 ; --baseline mean ;
        --method "" ; --rate "" ; --rate 1e-400 ; --rate -0.1 ; --rate 0.1 0.2 ; --price 1e300 --steps 20 ;
        --price -1e300 ; --noise 1e300 ; --rate 1e-300 ; --learning-rate 1e12 --steps 20 ; --steps ; --out ;
        --steps= ; --seed= --steps 5
    """,
    "train reversal": """
        --delay -1 ; --delay 1.5 ; --delay 1000000000 ; --delay-kind new ; --bug 2 ; --bug nan ; --corrupt -0.1 ;
        --discover 1.5 ; --corrupt 0.1 --credit token ; --bug 0.1 --unit token ; --floor 0.1 ;
        --floor 1 --method unbiased ; --floor nan --method unbiased ;
        --method importance --learning-rate 1e30 --steps 20 --delay 3 ;
        --learning-rate 1e30 --steps 20 ; --method dg --learning-rate 1e30 --steps 20 ;
        --method ppo --learning-rate 1e30 --steps 20 ; --method uniform --learning-rate 1e30 --steps 20 ;
        --unit token --learning-rate 1e30 --steps 20 ; --screen stale --learning-rate 1e30 --steps 20 ;
        --screen draft --draft-learning-rate 1e30 --steps 20 ;
        --screen draft --draft-learning-rate -1 --steps 20 ; --exit-layers 0 --screen early-exit ;
        --exit-layers 100 --screen early-exit ; --exit-layers -1 --screen early-exit ; --screen cached ;
        --prompt-length 0 ; --prompt-length 1000000 ; --prompt-length 1000000000000 ; --vocab-size 1 ;
        --vocab-size 1000000000 ; --prompts 1000000000 ; --answers 1000000000 ; --held-out 1000000000 ;
        --held-out 0 ; --layers 1000000000 ; --width 1000000 ; --width 63 ; --heads 0 ; --heads 1000000000 ;
        --feed-forward 1000000000 ; --target sort ; --shaping none ; --credit token --shaping all-or-nothing ;
        --unit token --method dg ; --price-kind rolling --price 0 ; --price-kind budget --temperature 1 ;
        --screen exact --verify 2 ; --learning-rate 1e11 --steps 20
    """,
    "": """
        train mnist mnist ; pareto chess ; study dance ; study ; bench everything ; fly ; --out ; --nonsense ;
        train --steps 5 ; train ; study frictoins ; studdy frictions ; scaling ; study scaling --leraning-rate 3 ;
        study --seeds 3 --help ; train mnsit --help
    """,
    "pareto mnist": """
        --methods ; --methods kondo kondo ; --methods sgd ; --rates 0.1 0.1 ; --rates nan ; --rates 0 ;
        --seeds 0 0 ; --seeds ; --seeds 0 99999999999999999999999 ; --prices nan ; --prices 0 0 ;
        --prices inf ; --uniform-rates 2 ; --uniform-rates 0.03 0.03 ; --steps 0 ;
        --steps 100000000000000000000000 ; --learning-rate nan ; --learning-rate 1e30 ; --learning-rate 0 ;
        --threads 100000 ; --target-error 7 ; --evaluate-every 0 ; --data /no ; --hidden 0 ; --batch-size 0 ;
        --rates 0.03 0.0300000001 --methods kondo --steps 5
    """,
    "pareto reversal": """
        --learning-rate 1e30 ; --prompt-length 0 ; --rates 1.1 ; --seeds 1 1 ; --width 10 ;
        --methods unbiased pg unbiased
    """,
    "study scores": """
        --scores ; --scores delight delight ; --scores joy ; --rate 0 ; --rate nan ; --alpha 2 ; --alpha nan ;
        --seeds ; --seeds 3 3 ; --steps 0 ; --steps 10000000000000 ; --evaluate-every -1 ; --data /no/where
    """,
    "study screening": """
        --parts ; --parts noise noise ; --parts music ; --data /no/where ; --full yes
    """,
    "study scaling": """
        --prompt-lengths 5 3 ; --prompt-lengths 5 5 ; --prompt-lengths 0 ; --prompt-lengths 10000000 ;
        --arms sgd ; --arms dg dg ; --learning-rates nan ; --learning-rates 1e-3 1e-3 ;
        --learning-rates 1e-3 1.0000000001e-3 ; --learning-rates -1 ; --learning-rates 1e-3 0 ;
        --learning-rates 1e30 ; --tuning-seeds 1 ; --tuning-seeds 100 100 ; --seeds 0 0 ; --answers 0 ;
        --answers -5 ; --answers 100000000000000000000 ; --target-error nan ; --evaluate-every 0 ;
        --vocab-size 0 ; --width 5 ; --width 10000000
    """,
    "study budget": """
        --tasks ; --tasks chess ; --tasks mnist mnist ; --arms ; --arms dg dg ; --arms all ; --learning-rates nan ;
        --learning-rates 1e-3 1.00000001e-3 ; --learning-rates 0 ; --seeds 100 ; --seeds 1 1 ; --tuning-seeds ;
        --reversal-steps 0 ; --reversal-steps 100000000000000000000000 ; --target-error nan ;
        --tasks "mnist, full" ; --tasks "mnist, full" --data /no/such
    """,
    "study language": """
        --task poems ; --arms ; --arms all ; --arms "noise 1" "noise 1" ; --steps 0 ; --steps 100000000000000000000000 ;
        --prompts 0 ; --group 1 ; --group 7 ; --micro-batch 0 ; --learning-rates ; --learning-rates nan ;
        --learning-rates 0 ; --learning-rates 1e30 ; --tuned "TRL's own" ; --tuned all ; --seeds ; --seeds 1 1 ;
        --seeds 100 ; --held-out 0 ; --evaluate-every 0 ; --threads 100000 ; --model /no/such
    """,
    "study frictions": """
        --frictions ; --frictions rain ; --frictions bug bug ; --arms sgd ; --arms dg dg ; --prompt-lengths 0 ;
        --prompt-lengths 100000000 ; --steps-per-token 0 ; --learning-rates nan ; --learning-rates 0 ;
        --seeds 100 ; --seeds ; --tuning-seeds 1 1 --seeds 2 ; --target-error 2 ; --vocab-size 1 ; --shaping no
    """,
    "study gain": """
        --rounds 0 ; --rounds 100000000000000000000000 ; --rate 0 ; --rate nan ; --bodies half ;
        --bodies plain plain ; --prompt-lengths 0 ; --prompt-lengths 5 5 ; --vocab-sizes 1 ;
        --vocab-sizes 1000000000000 ; --widths 3 ; --widths 4000000 ; --body-width 1
    """,
    "study tokens": """
        --prompt-length 0 ; --steps 0 ; --steps 100000000000000000000000 ; --learning-rate 1e30 --steps 10 ;
        --learning-rate nan ; --seeds ; --seeds 1 1 ; --evaluate-every 0
    """,
    "study bandit": """
        --arms ; --arms 1 ; --arms 3 3 ; --arms 1000000000 ; --p 0 ; --p nan ; --p 0.1 0.1 ; --sigma -1 ;
        --sigma nan ; --sigma inf ; --gap 0 ; --gap nan ; --start 1 ; --temperatures 0 ; --alphas 2 ;
        --context-p 0.5 ; --context-p 0.5 0.5 ; --draws 0 ; --draws 1000000000000 ; --batches 1000000000 ;
        --max-draws 100000000000000000000000 ; --seeds 1000000000 ; --steps 1000000000000000 ; --batch 0 ;
        --memory 0 ; --memory 1000000000000 ; --log-ratios ; --log-ratios 100 ; --corner-steps 0 ;
        --learning-rate nan ; --rate 0 ; --seed -1 ;
        --seed 100000000000000000000 ; --fit-below 0 ; --constant-baseline 1 ; --gap 1e300 ; --gap 1e-300 ;
        --sigma 1e300 ; --learning-rate 1e30 ; --p 1e-300
    """,
    "bench": """
        --device x ; --device cuda ; --device cuda:7 ; --arms fast ; --arms known known ; --rates 0 ;
        --rates 0.1 0.1 ; --rates nan ; --rates ; --memory-rates 7 ; --micro-batch-sizes 0 ;
        --micro-batch-sizes ; --micro-batch-sizes 4 4 ; --rounds 0 ; --threads 100000 ; --threads 0 ;
        --model gpt5 ; --rows 0 ; --rows 1000000000000 ; --length 1000000000000 ; --vocabulary 1000000000000 ;
        --vocabulary 0 ; --positive 2 ; --positive nan ; --zero -1 ; --seed 99999999999999999999999999 ;
        --train-only head
    """,
}
LINES = [(command, line.strip()) for command, lines in WRONG.items() for line in lines.replace("\n", " ").split(" ; ")]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "flags"), LINES, ids=[" ".join(line) for line in LINES])
def test_a_wrong_line_is_one_line_and_status_2_and_leaves_nothing(monkeypatch, capsys, tmp_path, command, flags):
    arguments = [*command.split(), *shlex.split(flags), "--out", str(tmp_path / "a" / "out")]
    monkeypatch.setattr(sys, "argv", ["sparkjoy", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("sparkjoy: ")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())
