import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn.utils import parameters_to_vector

import sparkjoy as sj
from sparkjoy.integrations import sampling
from sparkjoy.integrations.transformers import SharedTokens

SIZE = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "eos_token_id": None}
LLAMA_LIKE = {**SIZE, "intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 64}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MODELS = {
    "Llama": LLAMA_LIKE,
    "Qwen2": LLAMA_LIKE,
    "Qwen3": {**LLAMA_LIKE, "head_dim": 8},
    "GPT2": {**SIZE, "n_positions": 64},
    "Phi": {**SIZE, "intermediate_size": 24},
    "Mistral": {**LLAMA_LIKE, "sliding_window": 4},
    "Gemma2": {**LLAMA_LIKE, "head_dim": 8, **SLIDING},
    "Gemma3": {**LLAMA_LIKE, "head_dim": 8, **SLIDING},
    "Qwen2 sliding": {**LLAMA_LIKE, "use_sliding_window": True, **SLIDING},
}


def model_of(family, attention="sdpa"):
    name = family.split()[0]
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")(**MODELS[family])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.eval() if attention == "eager" else model.double().eval()  # its softmax is in float32 anyway


def answered(prompts=3, answers=4, prompt=7, answer=6, seed=0):
    """Prompts of several lengths, padded on the left, and answers, padded on the right: ids, mask, scored."""
    drawn = torch.Generator().manual_seed(seed)
    first = torch.randint(3, 23, (prompts, prompt), generator=drawn).repeat_interleave(answers, dim=0)
    then = torch.randint(3, 6, (prompts * answers, answer), generator=drawn)  # of few tokens, so they begin alike
    then[1] = then[0]
    skipped = torch.randint(0, prompt - 1, (prompts, 1), generator=drawn).repeat_interleave(answers, dim=0)
    lengths = torch.randint(1, answer + 1, (prompts * answers, 1), generator=drawn)
    mask = torch.cat([torch.arange(prompt) >= skipped, torch.arange(answer) < lengths], dim=1).long()
    ids = torch.cat([first, then], dim=1) * mask
    return ids, mask, mask * (torch.arange(prompt + answer) >= prompt)


def plain(model, ids, mask, scored, temperature=1.0):
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, :-1] / temperature
    of_all = logits.log_softmax(dim=-1)
    log_probs = of_all.gather(2, ids[:, 1:, None]).squeeze(2)
    entropies = -(of_all.exp() * of_all).sum(dim=2)
    return [torch.nn.functional.pad(values, (1, 0)) * scored for values in (log_probs, entropies)]


def gradient(model, value):
    model.zero_grad()
    value.backward()
    return parameters_to_vector([p.grad for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("family", "attention"),
    # transformers runs Gemma 2's soft capping with eager attention only
    [(family, kind) for family in MODELS for kind in ("sdpa", "eager") if (family, kind) != ("Gemma2", "sdpa")],
)
def test_log_probs_entropies_and_gradients_are_those_of_the_plain_pass(family, attention):
    model, (ids, mask, scored) = model_of(family, attention), answered()
    shared = SharedTokens(model, temperature=0.7)
    found = shared.log_probs_and_entropies(ids, mask, scored)
    expected = plain(model, ids, mask, scored, temperature=0.7)
    assert shared.agrees
    assert shared.distinct_tokens < 0.75 * shared.padded_tokens == 0.75 * ids.numel()
    for of_tree, of_rows in zip(found, expected, strict=True):
        assert torch.allclose(of_tree, of_rows, atol=1e-5)  # heads and rotations of some run in float32
    weights = torch.linspace(-1, 1, ids.numel()).view_as(ids)
    gradients = [gradient(model, (weights * pair[0] + weights**2 * pair[1]).sum()) for pair in (found, expected)]
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


@pytest.mark.parametrize("room", [3, 64])
@pytest.mark.parametrize("family", MODELS)
def test_the_same_draws_give_the_same_answers(family, room, monkeypatch):
    monkeypatch.setattr(sampling, "ROOM", room)
    model = model_of(family, "eager" if family == "Gemma2" else "sdpa").float()
    ids, mask, _ = (tensor[:, :7] for tensor in answered())
    passes, answers = [], []
    model.get_input_embeddings().register_forward_hook(lambda _, given, __: passes.append(given[0].numel()))
    for generate in (
        SharedTokens(model).generate,
        lambda ids, mask, **options: model.generate(ids, attention_mask=mask, **options),
    ):
        torch.manual_seed(1)
        answers.append(generate(ids, mask, do_sample=True, max_new_tokens=9, pad_token_id=0))
        passes.append(None)
    assert torch.equal(*answers)
    shared, plainly = passes[: passes.index(None)], passes[passes.index(None) + 1 : -1]
    assert sum(plainly) == 12 * 7 + 12 * 8
    assert sum(shared) == (3 * 7 + 12 * 8 if not getattr(model.config, "sliding_window", None) else sum(plainly))


@pytest.mark.parametrize("wrap", ["LoRA", "checkpointing", "reentrant checkpointing", "compile"])
def test_it_goes_with_what_wraps_a_model(wrap):
    model, (ids, mask, scored) = model_of("Llama"), answered()
    if wrap == "LoRA":
        model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False)).double()
    elif "checkpointing" in wrap:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": wrap.startswith("reentrant")})
        model.enable_input_require_grads()
    weights = torch.linspace(-1, 1, ids.numel()).view_as(ids)
    shared = SharedTokens(model)
    values = shared.log_probs(ids, mask, scored), plain(model, ids, mask, scored)[0]
    assert shared.agrees
    found, expected = (gradient(model, (weights * value).sum()) for value in values)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_the_gate_and_the_tree_together_have_the_masked_gradient():
    model, (ids, mask, scored) = model_of("Qwen2"), answered()
    advantages = torch.linspace(-1, 1, len(ids), dtype=torch.float64)
    shared, sizes = SharedTokens(model), []

    def log_prob_fn(rows):
        sizes.append(rows["prompt"].tolist())
        return shared.log_probs(rows["ids"], rows["mask"], rows["scored"])

    rows = {"ids": ids, "mask": mask, "scored": scored, "prompt": torch.arange(3).repeat_interleave(4)}
    shuffled = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    rows = {name: value[shuffled] for name, value in rows.items()}
    step = sj.GatedBackward(sj.KondoGate(rate=0.6), micro_batch_size=5, group_by="prompt")
    model.zero_grad()
    report = step(log_prob_fn, rows, advantages[shuffled], mask=rows["scored"])
    found = parameters_to_vector([p.grad for p in model.parameters()])
    kept = torch.zeros(len(ids), dtype=torch.bool).index_put((shuffled,), report.decision.keep)
    terms = -advantages[:, None] * plain(model, ids, mask, scored)[0] * kept[:, None]
    expected = gradient(model, terms.sum() / scored.sum())
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert shared.distinct_tokens < shared.padded_tokens
    assert sum(map(len, sizes[-2:])) == report.kept == 8
    assert not set(sizes[-2]) & set(sizes[-1])  # a prompt's rows in one micro-batch


def test_long_answers_to_short_prompts_run_as_they_are():
    model = model_of("Llama")
    ids = torch.randint(3, 23, (4, 40), generator=torch.Generator().manual_seed(0))
    ids[:, :2] = 5
    shared = SharedTokens(model)
    shared.log_probs(ids, torch.ones_like(ids), (torch.arange(40) >= 2).expand_as(ids))
    assert shared.agrees is None  # nothing to compare
    assert shared.distinct_tokens == shared.padded_tokens == ids.numel()


def test_where_they_differ_it_warns_once_and_runs_the_rows():
    model, (ids, mask, scored) = model_of("Llama"), answered()

    def position_in_the_pass(module, args, given):
        embedded = module.embed_tokens(given.pop("input_ids"))
        return args, {**given, "inputs_embeds": embedded * (1 + torch.arange(embedded.shape[1]).view(1, -1, 1))}

    model.model.register_forward_pre_hook(position_in_the_pass, with_kwargs=True)
    shared = SharedTokens(model.train())
    with pytest.warns(UserWarning, match="LlamaForCausalLM's log-probs would be off by"):
        found = shared.log_probs(ids, mask, scored)
    assert torch.allclose(found, plain(model, ids, mask, scored)[0], atol=1e-6)
    assert shared.distinct_tokens == shared.padded_tokens == ids.numel()
    assert model.training
    shared.log_probs(ids, mask, scored)  # without a word


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("Llama", {"_attn_implementation": "flash_attention_2"}, "Load the model with attn_implementation='sdpa'"),
        ("Llama", {"model_type": "bloom"}, "ALiBi"),
        ("Llama", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ("Llama", {"is_encoder_decoder": True}, "an encoder's states"),
    ],
)
def test_what_cannot_share_is_refused(family, changes, said):
    model = model_of(family)
    for name, value in changes.items():
        object.__setattr__(model.config, name, value)
    with pytest.raises(ValueError, match=said):
        SharedTokens(model)


def test_tokens_that_an_adapter_puts_before_rows_are_refused():
    adapter = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="prompt or prefix tuning"):
        SharedTokens(get_peft_model(model_of("Llama"), adapter))
