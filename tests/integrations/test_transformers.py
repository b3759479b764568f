import pytest
import torch
import transformers
from torch.nn.utils import parameters_to_vector

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
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1] / temperature
    of_all = logits.log_softmax(dim=-1)
    log_probs = of_all.gather(2, ids[:, 1:, None]).squeeze(2)
    entropies = -(of_all.exp() * of_all).sum(dim=2)
    return [torch.nn.functional.pad(values, (1, 0)) * scored for values in (log_probs, entropies)]


def gradient(model, value):
    model.zero_grad()
    value.backward()
    return parameters_to_vector([p.grad for p in model.parameters()])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", MODELS)
def test_log_probs_entropies_and_gradients_are_those_of_the_plain_pass(family, attention):
    if family == "Gemma2" and attention == "sdpa":
        pytest.skip("transformers runs its soft capping with eager attention only")
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


@pytest.mark.parametrize("family", MODELS)
def test_the_same_draws_give_the_same_answers(family):
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
    shared, as_before = passes[: passes.index(None)], passes[passes.index(None) + 1 : -1]
    assert sum(shared) == 3 * 6 + 12 * 9
    assert sum(as_before) == 12 * 7 + 12 * 8
