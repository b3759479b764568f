"""Random damage to a run's folder: refused in one line and left as it is, or the run ends as an unbroken one."""

import json
import os
import random
import shutil

import pytest
from command_line import sparkjoy

from sparkjoy_lab.training import loop
from sparkjoy_lab.training.checkpoint import load_checkpoint


def damage_bit(path, chance):
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def damage_length(path, chance):
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data))] if chance.random() < 0.7 else data + b"\n{}")


def damage_all(path, chance):
    path.write_bytes(chance.choice([b"", b"null", b"[]", b"7", b"[" * 50_000, b"\x00" * 100, bytes(range(256))]))


def damage_gone(path, chance):
    path.unlink()


def damage_kind(path, chance):
    path.unlink()
    others = (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path), lambda: path.symlink_to("gone"))
    chance.choice(others)()


def damage_swap(path, chance):
    path.write_bytes(chance.choice(sorted(p for p in path.parent.iterdir() if p.is_file())).read_bytes())


def damage_values(path, chance):
    config = json.loads((path.parent.parent / "whole" / "config.json").read_text())
    key = chance.choice(sorted(config))
    config[key] = chance.choice([None, [], {}, 1e300, "x", config.pop(key), {"a": dict(config)}])
    (path.parent / "config.json").unlink(missing_ok=True)
    (path.parent / "config.json").write_text(json.dumps(config))


DAMAGES = (damage_bit, damage_length, damage_all, damage_gone, damage_kind, damage_swap, damage_values)


def comparable(out):
    lines = (out / "records.jsonl").read_text().splitlines()
    return [{**json.loads(line), "seconds": None} for line in lines]


def tree(out):
    return {path.name: path.read_bytes() if path.is_file() else None for path in out.iterdir()}


@pytest.mark.slow
def test_a_damaged_folder_is_refused_whole_or_ends_as_an_unbroken_one(monkeypatch, capsys, tmp_path):
    flags = ("train", "mnist", "--steps", 20, "--evaluate-every", 5)
    assert sparkjoy(monkeypatch, capsys, *flags, "--out", tmp_path / "whole")[0] == 0
    weights = load_checkpoint(tmp_path / "whole" / "checkpoint.pt")["policy"]
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    real = loop.Training.step
    monkeypatch.setattr(loop.Training, "step", lambda run: real(run) if run.steps_done < 12 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sparkjoy(monkeypatch, capsys, *flags, "--out", tmp_path / "half")
    monkeypatch.setattr(loop.Training, "step", real)
    chance = random.Random(int(os.environ.get("SPARKJOY_DAMAGE_SEED", "0")))
    refused = 0
    for number in range(200):
        out = tmp_path / str(number)
        shutil.copytree(tmp_path / chance.choice(["whole", "half"]), out)
        told = []
        for _ in range(chance.choice([1, 1, 1, 2])):
            path = chance.choice(sorted(path for path in out.iterdir() if path.is_file() and path.stat().st_size))
            damage = chance.choice(DAMAGES)
            told.append((damage.__name__, path.name))
            damage(path, chance)
        before = tree(out)
        status, said = sparkjoy(monkeypatch, capsys, *flags, "--out", out)
        if status == 2:
            refused += 1
            assert said.count("\n") == 1, told
            assert {name: tree(out).get(name) for name in before} == before, told
        else:
            assert status == 0, told
            assert comparable(out) == comparable(tmp_path / "whole"), told
            found = load_checkpoint(out / "checkpoint.pt")["policy"]
            assert all((found[name] == weights[name]).all() for name in weights), told
        shutil.rmtree(out)
    assert 50 < refused < 200
