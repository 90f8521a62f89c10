"""Chunked log-probabilities against the plain ones from all logits, values and gradients."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
)

from mogeo.dpo.log_probs import sequence_log_probs, split_head

TINY = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": LlamaConfig(**TINY, **TOKENS),
    "llama-tied": LlamaConfig(**TINY, **TOKENS, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**TINY, **TOKENS, head_dim=8, num_key_value_heads=1, final_logit_softcapping=2.0),
    "cohere": CohereConfig(**TINY, **TOKENS, logit_scale=0.25),
    "granite": GraniteConfig(**TINY, **TOKENS, logits_scaling=3.0, embedding_multiplier=2.0),
    "gpt2": GPT2Config(
        vocab_size=61,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "opt": OPTConfig(
        dropout=0.0,
        vocab_size=61,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        **TOKENS,
    ),
}
SEPARABLE = {"llama", "llama-tied", "gemma2", "cohere", "granite", "gpt2"}  # OPT's forward reaches past its base model


def tiny(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype).train()
    with torch.no_grad():  # away from the small initial weights, so that soft-capping and scaling bend the logits
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def batch():
    """Four right-padded sequences of 3 prompt tokens and 0 to 8 completion tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (4, 12), generator=generator)
    lengths = torch.tensor([11, 7, 12, 3])
    position = torch.arange(12)
    attention = (position < lengths[:, None]).long()
    ids[attention == 0] = 0
    return ids, attention, (position >= 3) & (position < lengths[:, None])


def plain_log_probs(model, ids, attention, completion):
    """All logits, float64 log-softmax, no masking tricks: what sequence_log_probs must equal."""
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits.double()
    log_probs = logits.log_softmax(-1)
    rows = []
    for b in range(len(ids)):
        wanted = [t for t in range(1, ids.shape[1]) if completion[b, t]]
        rows.append(sum((log_probs[b, t - 1, ids[b, t]] for t in wanted), log_probs.new_zeros(())))
    return torch.stack(rows)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_equal_the_plain_computation(name, chunk_tokens):
    model, data = tiny(name), batch()
    ours = sequence_log_probs(model, *data, chunk_tokens=chunk_tokens)
    assert ours.dtype == torch.float32
    plain = plain_log_probs(model, *data)
    torch.testing.assert_close(ours.double(), plain, rtol=1e-5, atol=1e-4)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad((plain * weights).sum(), parameters, allow_unused=True)
    got = torch.autograd.grad((ours * weights).sum(), parameters, allow_unused=True)
    for e, g in zip(expected, got, strict=True):
        assert (e is None) == (g is None)
        if e is not None:
            torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-4 * float(e.abs().max()) + 1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_full_logits_are_never_made_where_the_head_can_be_told_apart(name):
    model, data = tiny(name), batch()
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: rows.append(output.shape[-2]))
    sequence_log_probs(model, *data)  # the seam is checked here, on a few tokens
    rows.clear()
    sequence_log_probs(model, *data, chunk_tokens=4).sum().backward()
    if name in SEPARABLE:
        assert max(rows) <= 4
        assert sum(rows) == 2 * int(data[2].sum())  # each completion token once forward, once recomputed
    else:
        assert rows == [12]


def test_a_completion_without_tokens_scores_zero():
    ids, attention, completion = batch()
    assert sequence_log_probs(tiny("llama"), ids, attention, torch.zeros_like(completion)).tolist() == [0, 0, 0, 0]
    assert sequence_log_probs(tiny("llama"), ids, attention, completion)[3] == 0


def test_the_log_softmax_is_in_fp32_under_bf16_autocast_and_with_bf16_weights():
    """With logits of ±40 a bf16 log-softmax is off by up to 0.25 a token; ours differs by the logits' rounding only."""
    ids, attention, completion = batch()
    model = tiny("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
        for run in (model, tiny("llama", torch.bfloat16)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                ours = sequence_log_probs(run, ids, attention, completion)
                logits = run(input_ids=ids, attention_mask=attention).logits
            exact = logits.double().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), (exact * completion[:, 1:]).sum(1), rtol=1e-3, atol=1e-3)


def test_checking_the_seam_leaves_training_mode_and_random_state_alone():
    model = tiny("llama")
    model.lm_head.eval()
    state = torch.get_rng_state()
    sequence_log_probs(model, *batch())
    assert model.training
    assert not model.lm_head.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_whose_forward_does_not_match_its_decoder_falls_back_to_that_forward():
    """A subclass that shifts its logits in a way that depends on the position: no head can be told apart."""
    model = tiny("llama")
    forward = type(model).forward

    class Shifted(type(model)):
        def forward(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            ramp = torch.arange(output.logits.shape[1])[:, None] * torch.linspace(-1, 1, 61)
            output.logits = output.logits + ramp
            return output

    model.__class__ = Shifted
    data = batch()
    assert split_head(model) is None
    torch.testing.assert_close(
        sequence_log_probs(model, *data).double(), plain_log_probs(model, *data), rtol=1e-5, atol=1e-4
    )
