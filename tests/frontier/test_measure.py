"""`sj.frontier` measures what the gates do, and leaves everything as it was."""

import math

import pytest
import torch
from engine_cases import SHAPES, make_case

import sparkjoy as sj
from sparkjoy.gradients import leaves

DEFAULT = ["dense", "noise 0.1", "noise 0.3", "noise 1", "noise 3", "hard 25%", "hard 10%", "hard 3%", "price 0"]


def measured(shape="rows", known=True, **options):
    policy, batch, advantages, mask = make_case(shape)
    with torch.no_grad():
        log_probs = policy.log_probs(batch) if known else None
    found = sj.frontier(
        policy.log_probs, batch, advantages, log_probs=log_probs, mask=mask, **{"rounds": 2, "seconds": 0} | options
    )
    return found, (policy, batch, advantages, mask, log_probs)


def flat(parameters):
    return torch.cat([parameter.grad.flatten() for parameter in parameters])


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_errors_and_cosines_are_those_of_the_engine(shape, known):
    gates = {"hard": sj.KondoGate(rate=0.3), "price": sj.KondoGate(price=0)}
    found, (policy, batch, advantages, mask, log_probs) = measured(shape, known, gates=gates, micro_batch_size=4)
    gradients = {}
    for name, gate in {"dense": None, **gates}.items():
        policy.zero_grad()
        report = sj.gated_backward(policy.log_probs, batch, advantages, gate, log_probs=log_probs, mask=mask)
        setting = next(one for one in found.settings if one.name == name)
        tokens = torch.ones_like(policy.log_probs(batch)) if mask is None else mask
        tokens = tokens.view(len(advantages), -1).sum(1)
        assert setting.rows == report.kept
        assert setting.tokens == int(tokens[report.decision.keep].sum())
        gradients[name] = flat(policy.parameters())
        dense = gradients["dense"]
        assert setting.error == pytest.approx(float((gradients[name] - dense).norm() / dense.norm()), abs=1e-6)
        assert setting.cosine == pytest.approx(
            float(torch.nn.functional.cosine_similarity(gradients[name], dense, dim=0)), abs=1e-6
        )
        assert setting.seconds > 0
    assert found.rows == len(advantages)
    assert found.tokens == found.dense.tokens
    assert [setting.noise for setting in found.settings] == [0, None, None]
    assert [setting.kind for setting in found.settings] == ["dense", "biased", "biased"]


@pytest.mark.parametrize(
    ("loss", "normalizer"),
    [(sj.reinforce, "batch"), (sj.delightful(), "samples"), (sj.clipped(), "kept"), (sj.delightful(), 7.0)],
)
def test_the_plain_dense_loop_has_the_engines_gradient(loss, normalizer):
    gates = {"hard": sj.KondoGate(rate=0.3)} if normalizer == "kept" else None
    found, _ = measured("ragged tokens", loss=loss, normalizer=normalizer, gates=gates, micro_batch_size=5, rounds=1)
    assert found.dense.error < 1e-6
    assert found.dense.cosine == pytest.approx(1)


def test_the_default_gates_report_their_noise_and_uniform_keeps_as_many_as_a_noise_of_a_third():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 5, generator=generator, requires_grad=True)
    advantages = torch.randn(400, generator=generator).exp() * torch.randn(400, generator=generator)
    found = sj.frontier(lambda rows: logits[rows].log_softmax(1)[:, 0], torch.arange(400), advantages, rounds=4)
    by_name = {setting.name: setting for setting in found.settings}
    uniform = next(name for name in by_name if name.startswith("uniform"))
    assert sorted(by_name) == sorted([*DEFAULT, uniform])
    for noise in (0.1, 0.3, 1.0, 3.0):
        assert by_name[f"noise {noise:g}"].noise == pytest.approx(noise, rel=1e-4)
        # rows of their own parameters: the second moment of the gradient is the square of its length
        assert by_name[f"noise {noise:g}"].error == pytest.approx(math.sqrt(noise), rel=0.3)
    assert by_name[uniform].rows == pytest.approx(by_name["noise 0.3"].rows, abs=2)
    assert by_name[uniform].noise > 2 * by_name["noise 0.3"].noise
    assert by_name["hard 25%"].rows == 100
    assert by_name["price 0"].rows == int((advantages > 0).sum())
    assert found.recommend().setting.kind in ("dense", "unbiased")


@pytest.mark.parametrize("fails", [False, True])
def test_gradients_random_state_and_gates_are_left_as_they_were(fails):
    policy, batch, advantages, _ = make_case("rows")
    weight, bias = policy.layer.weight, policy.layer.bias
    weight.grad = torch.full_like(weight, 7.0)
    own, before, calls = weight.grad, [parameter.clone() for parameter in policy.parameters()], 0
    gate = sj.UnbiasedGate(noise=1.0)  # draws from the global generator
    state, random = gate.state_dict(), torch.get_rng_state()

    def log_prob_fn(rows):
        nonlocal calls
        calls += 1
        if fails and calls == 9:
            raise RuntimeError("in the middle")
        return torch.nn.functional.dropout(policy.log_probs(rows), 0.0) + 0 * torch.rand(())

    def run():
        return sj.frontier(log_prob_fn, batch, advantages, gates={"own": gate}, rounds=2)

    if fails:
        with pytest.raises(RuntimeError, match="in the middle"):
            run()
    else:
        run()
    assert weight.grad is own
    assert bool((own == 7).all())
    assert bias.grad is None
    assert torch.equal(torch.get_rng_state(), random)
    assert gate.state_dict() == state
    assert all(torch.equal(*pair) for pair in zip(policy.parameters(), before, strict=True))


def test_parameters_are_found_in_the_graph_frozen_ones_and_others_are_not():
    used, frozen, unused = (torch.nn.Linear(3, 3) for _ in range(3))
    frozen.requires_grad_(False)
    found = list(leaves(frozen(used(torch.ones(2, 3))).relu().sum()))
    assert {id(leaf) for leaf in found} == {id(parameter) for parameter in used.parameters()}
    assert not {id(parameter) for parameter in unused.parameters()} & {id(leaf) for leaf in found}
    leaf = torch.ones(2, requires_grad=True)
    assert [one is leaf for one in leaves(leaf)] == [True]


def test_parameters_that_no_graph_shows_can_be_given():
    policy, batch, advantages, _ = make_case("rows")
    policy.layer.weight.grad = own = torch.ones_like(policy.layer.weight)

    def log_prob_fn(rows):
        states = rows["state"].clone().requires_grad_()  # a reentrant checkpoint needs one
        logits = torch.utils.checkpoint.checkpoint(policy, states, use_reentrant=True)
        return logits.gather(1, rows["action"].unsqueeze(1)).squeeze(1)

    found = sj.frontier(log_prob_fn, batch, advantages, parameters=policy.parameters(), rounds=1)
    assert policy.layer.weight.grad is own
    assert bool((own == 1).all())
    assert found.dense.error < 1e-6
    assert found.settings[4].error > 0.1


def test_a_leaf_made_on_the_way_is_no_parameter():
    """As embeddings are under frozen bodies, where a checkpoint needs an input that requires a gradient."""
    policy, batch, advantages, _ = make_case("rows")

    def log_prob_fn(rows):
        return policy.log_probs({**rows, "state": rows["state"].clone().requires_grad_()})

    found = sj.frontier(log_prob_fn, batch, advantages, gates={"hard": sj.KondoGate(rate=0.3)}, rounds=1)
    plain = sj.frontier(policy.log_probs, batch, advantages, gates={"hard": sj.KondoGate(rate=0.3)}, rounds=1)
    assert found.dense.error < 1e-6
    assert found.settings[1].error == pytest.approx(plain.settings[1].error)


def test_bytes_kept_for_the_backward_pass_follow_the_rows_and_repeat():
    states, layer = torch.randn(64, 32), torch.nn.Linear(32, 16)
    gates = {"hard": sj.KondoGate(rate=0.25)}

    def peaks(size):
        found = sj.frontier(
            lambda rows: layer(rows["x"]).tanh().log_softmax(1)[:, 0],
            {"x": states},
            torch.linspace(0.1, 1, 64),
            gates=gates,
            log_probs=-torch.ones(64),
            micro_batch_size=size,
            rounds=1,
        )
        return [setting.peak_bytes for setting in found.settings]

    dense, hard = peaks(64)
    assert peaks(64) == [dense, hard]
    of_a_row = (32 + 2 * 16) * 4  # the copy of a row, and what tanh and log_softmax keep
    assert dense == pytest.approx(64 * of_a_row, rel=0.1)
    assert hard == pytest.approx(16 * of_a_row, rel=0.1)
    assert peaks(8)[0] < dense / 4


@pytest.mark.timing
def test_a_tiny_mlp_is_told_to_take_the_dense_step():
    torch.manual_seed(0)
    policy = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    batch = {"states": torch.randn(64, 16), "actions": torch.randint(4, (64,))}

    def log_prob_fn(rows):
        return policy(rows["states"]).log_softmax(1).gather(1, rows["actions"].unsqueeze(1)).squeeze(1)

    found = sj.frontier(log_prob_fn, batch, torch.randn(64), seconds=2)
    assert found.recommend().setting.name == "dense"
    assert found.recommend().reason.startswith("The dense step: noise")


@pytest.mark.parametrize("rounds", [2, None])
def test_progress_is_told_before_every_turn_and_at_the_end_and_never_falls(rounds):
    policy, batch, advantages, _ = make_case("rows")
    told = []
    found = sj.frontier(
        policy.log_probs,
        batch,
        advantages,
        shared=policy.log_probs,
        progress=lambda fraction, what: told.append((fraction, what)),
        rounds=rounds,
        seconds=0.2,
    )
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    assert told[-1] == (1.0, "done")
    assert sum(what.startswith("turn") for _, what in told) == found.dense.turns * (10 + 5)


def test_parameters_that_only_the_shared_function_has_are_left_as_they_were():
    policy, batch, advantages, _ = make_case("rows")
    own = torch.zeros((), dtype=torch.float64, requires_grad=True)
    gates = {"noise": sj.UnbiasedGate(noise=0.3)}
    found = sj.frontier(
        policy.log_probs, batch, advantages, gates=gates, rounds=1, shared=lambda rows: policy.log_probs(rows) + own
    )
    assert [setting.name for setting in found.settings] == ["dense", "noise", "dense, shared", "noise, shared"]
    assert own.grad is None


def test_a_policy_too_sure_for_sizes_is_measured_and_told_to_take_the_dense_step():
    """Its log-probs round to 0, its gradient does not, so a noise budget keeps nothing: no step to train with."""
    logits = torch.tensor([[20.0, 0.0]] * 8, requires_grad=True)
    advantages = torch.tensor([1.5, -0.5]).repeat(4)
    found = sj.frontier(lambda rows: logits[rows].log_softmax(1)[:, 0], torch.arange(8), advantages, rounds=1)
    assert {setting.name: setting.rows for setting in found.settings}["noise 0.3"] == 0
    assert found.recommend().setting.name == "dense"
    assert "no unbiased gate" in found.recommend().reason


def test_the_number_of_turns_follows_the_time_there_is():
    assert {setting.turns for setting in measured(rounds=None, seconds=0)[0].settings} == {3}
    assert measured(rounds=None, seconds=60, gates={"hard": sj.KondoGate(rate=0.5)})[0].dense.turns == 50


def test_a_step_that_keeps_nothing_has_no_gradient():
    policy, batch, advantages, _ = make_case("rows")
    found = sj.frontier(policy.log_probs, batch, -advantages.abs(), gates={"none": sj.KondoGate(price=0)}, rounds=1)
    nothing = found.settings[1]
    assert (nothing.rows, nothing.error, nothing.cosine) == (0, pytest.approx(1), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": {}}, "at least one gate by name"),
        ({"gates": [sj.KondoGate(rate=0.5)]}, "expected a dict"),
        ({"gates": {"dense": sj.KondoGate(rate=0.5)}}, "a string other than 'dense'"),
        ({"gates": {"plain": 0.3}}, "expected a callable"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"seconds": math.nan}, "seconds is nan"),
        ({"parameters": [torch.ones(3)]}, "parameters has none that requires a gradient"),
        ({"normalizer": "rows"}, "normalizer is 'rows'"),
        ({"normalizer": "kept"}, "normalizer is 'kept' and the gate UnbiasedGate"),
        ({"advantages": torch.zeros(13)}, "advantages are all 0"),
        ({"advantages": torch.full((13,), math.nan)}, "NaN or infinite"),
        ({"log_probs": -torch.ones(5)}, "log_probs"),
        ({"shared": 3}, "shared is 3"),
        ({"shared": lambda rows: None, "micro_batch_size": 4}, "returned a NoneType; expected a floating-point tensor"),
        ({"group_by": "prompt"}, "group_by is 'prompt', for the settings with `shared`"),
        ({"sampling_seconds": (1, 2, 3)}, "sampling_seconds has 3 numbers"),
        ({"sampling_seconds": -1}, "sampling_seconds is -1"),
    ],
)
def test_wrong_input_is_refused_before_any_gradient_is_touched(options, message):
    policy, batch, advantages, _ = make_case("rows")
    given = {"advantages": advantages} | options
    with pytest.raises((ValueError, TypeError), match=message):
        sj.frontier(policy.log_probs, batch, given.pop("advantages"), **given)
    assert policy.layer.weight.grad is None


def test_a_batch_without_a_gradient_is_refused():
    weight = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="gradient of the batch has a length of 0"):
        sj.frontier(lambda rows: 0 * weight[rows] - 1, torch.arange(3), torch.ones(3))
    with pytest.raises(ValueError, match="gradient of the batch has a length of nan"):
        sj.frontier(lambda rows: -weight[rows].sqrt() - 1, torch.arange(3), torch.tensor([1.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="without a graph"):
        sj.frontier(lambda rows: -torch.ones(len(rows)), torch.arange(3), torch.ones(3))
    assert weight.grad is None


def test_a_hook_that_steps_in_the_backward_pass_is_refused():
    policy, batch, advantages, _ = make_case("rows")
    before = policy.layer.weight.clone()

    def step(parameter):
        parameter.data -= parameter.grad

    policy.layer.weight.register_post_accumulate_grad_hook(step)
    with pytest.raises(ValueError, match=r"hook that runs as soon as its gradient has arrived.*while measuring"):
        sj.frontier(policy.log_probs, batch, advantages)
    assert torch.equal(policy.layer.weight, before)
