"""Loading models: a folder or GGUF file gives the logits of the model it was made from; errors name the cure."""

import json

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from mogeo.dpo.models import check_model_source, context_length, load_model, pad_token, prompt_format_for
from mogeo.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gguf")

IDS = torch.tensor([[3, 4, 5, 6]])


def test_a_folder_gives_back_model_and_tokenizer_in_fp32(tmp_path, make_model, tokenizer):
    model = make_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    for ours, theirs in zip(loaded.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.float())
    assert loaded.tokenizer("what is")["input_ids"] == tokenizer("what is")["input_ids"]
    assert loaded.tokenizer.chat_template == tokenizer.chat_template


def write_gguf(path, model, words):
    """A GGUF file of a Llama, as llama.cpp's converter lays it out (its q and k rows interleaved for their RoPE)."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inner = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, value in model.state_dict().items():
        stem = name.removesuffix(".weight")
        weight = value.float()
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            if rest in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads if "q_proj" in rest else config.num_key_value_heads
                weight = weight.reshape(heads, 2, -1, config.hidden_size).transpose(1, 2).reshape(weight.shape)
            target = f"blk.{layer}.{inner[rest]}"
        else:
            target = names[stem]
        writer.add_tensor(f"{target}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_model_it_was_made_from_ready_to_train_and_save(tmp_path):
    torch.manual_seed(0)
    words = ["<unk>", "<eos>", "ab", *map(chr, range(ord("a"), ord("a") + 13))]
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
    )
    model = LlamaForCausalLM(config).eval()
    write_gguf(tmp_path / "tiny.gguf", model, words)
    loaded = load_model(str(tmp_path / "tiny.gguf"))
    torch.testing.assert_close(loaded.model.eval()(IDS).logits, model(IDS).logits)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert context_length(loaded.model) == 48
    loaded.model(IDS).logits.sum().backward()
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(load_model(str(tmp_path / "saved")).model.eval()(IDS).logits, model(IDS).logits)


def test_a_path_at_which_nothing_lies_is_not_looked_up_on_the_hub(tmp_path):
    for source in (str(tmp_path / "missing"), "missing.gguf", "./missing", "a/b/c"):
        with pytest.raises(InputError, match=rf"model '{source}' does not exist"):
            load_model(source)


def test_a_file_or_folder_that_is_no_model_says_what_to_name_instead(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(InputError, match=r"is a file; name its folder, or a \.gguf file"):
        check_model_source(str(tmp_path / "weights.bin"))
    with pytest.raises(InputError, match=r"has no config.json; a model saved by save_pretrained has one"):
        check_model_source(str(tmp_path))
    (tmp_path / "m.gguf").touch()
    with pytest.raises(InputError, match=r"has no config.json; name the file in it: .*m\.gguf"):
        check_model_source(str(tmp_path))


def test_a_damaged_model_is_one_error(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(InputError, match=r"model '.*m\.gguf' cannot be loaded"):
        load_model(str(tmp_path / "m.gguf"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}), encoding="utf-8")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_a_hub_name_that_cannot_be_had_is_one_error(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(
        InputError, match=r"model 'someone/model' cannot be loaded \(OSError: We couldn't connect to the"
    ):
        load_model("someone/model")


def test_chat_needs_a_template_and_padding_takes_what_there_is(tokenizer):
    assert prompt_format_for(tokenizer, "chat") == "chat"
    assert prompt_format_for(tokenizer, "plain") == "plain"
    assert pad_token(tokenizer) == 0
    tokenizer.chat_template = tokenizer.pad_token = None
    assert prompt_format_for(tokenizer, "chat") == "plain"
    assert pad_token(tokenizer) == 1
    tokenizer.eos_token = None
    assert pad_token(tokenizer) == 0
