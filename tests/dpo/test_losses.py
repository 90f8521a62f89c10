"""DPO losses against independent float64 numpy, and chunked log-probabilities against the plain full-logits ones."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
)

from mogeo.dpo import losses
from mogeo.dpo.losses import LOSSES, dpo_loss, modpo_loss, sequence_log_probs
from tests.profiles import examples

# ---- dpo_loss --------------------------------------------------------------------------------------------------------


def numpy_loss(margins, beta, kind, smoothing):
    """The formulas once more, by another route: softplus through logaddexp in float64."""
    h = np.asarray(margins, dtype=np.float64)
    if kind == "sigmoid":
        return (1 - smoothing) * np.logaddexp(0, -beta * h) + smoothing * np.logaddexp(0, beta * h)
    if kind == "ipo":
        return np.square(h - 0.5 / beta)
    return np.maximum(0, 1 - beta * h)


CASES = [("sigmoid", 0.0), ("sigmoid", 0.1), ("sigmoid", 0.49), ("ipo", 0.0), ("hinge", 0.0)]


@pytest.mark.parametrize(("kind", "smoothing"), CASES)
@given(
    margins=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8),
    beta=st.sampled_from([0.01, 0.1, 0.5, 2.0]),
)
@examples(50)
def test_loss_equals_its_formula(kind, smoothing, margins, beta):
    ours = dpo_loss(torch.tensor(margins, dtype=torch.float64), beta, kind, smoothing)
    np.testing.assert_allclose(ours.numpy(), numpy_loss(margins, beta, kind, smoothing), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize(("kind", "smoothing"), CASES)
def test_loss_and_slope_are_right_in_fp32_at_margins_of_ten_thousand(kind, smoothing):
    margins = torch.tensor([-1e4, -1.0, 0.0, 1.0, 1e4], requires_grad=True)
    loss = dpo_loss(margins, 0.5, kind, smoothing)
    loss.sum().backward()
    np.testing.assert_allclose(loss.detach().numpy(), numpy_loss(margins.detach(), 0.5, kind, smoothing), rtol=1e-5)
    h = margins.detach().double().numpy()
    s = 1 / (1 + np.exp(np.clip(0.5 * h, -500, 500)))  # σ(−βh)
    slope = {
        "sigmoid": 0.5 * (-(1 - smoothing) * s + smoothing * (1 - s)),
        "ipo": 2 * (h - 1),
        "hinge": np.where(h < 2, -0.5, 0),
    }[kind]
    np.testing.assert_allclose(margins.grad.numpy(), slope, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("kind", LOSSES)
def test_at_the_start_every_loss_pulls_towards_the_chosen_completion(kind):
    margins = torch.zeros(3, requires_grad=True)
    dpo_loss(margins, 0.1, kind).sum().backward()
    assert (margins.grad < 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"beta": 0.1, "kind": "dpo"}, "unknown loss 'dpo'.*sigmoid, ipo, hinge"),
        ({"beta": 0.1, "label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ({"beta": 0.1, "kind": "ipo", "label_smoothing": 0.1}, "sigmoid loss only"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(torch.zeros(1), **arguments)


@given(
    margins=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=8),
    shift=st.floats(-50, 50),
    beta=st.sampled_from([0.1, 0.5]),
    weight=st.sampled_from([0.1, 0.25, 1.0]),
)
@examples(50)
def test_modpo_equals_its_formula_and_is_dpo_on_a_shifted_margin(margins, shift, beta, weight):
    h = torch.tensor(margins, dtype=torch.float64)
    others = torch.full_like(h, shift)
    ours = modpo_loss(h, others, beta, weight)
    by_hand = np.logaddexp(0, -(beta * h.numpy() - shift) / weight)
    np.testing.assert_allclose(ours.numpy(), by_hand, rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(ours, dpo_loss(h - shift / beta, beta / weight), rtol=1e-9, atol=1e-12)
    assert torch.equal(modpo_loss(h, torch.zeros_like(h), beta, 1.0), dpo_loss(h, beta))


def test_modpo_refuses_what_is_no_share():
    for weight in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match="weight must be in"):
            modpo_loss(torch.zeros(1), torch.zeros(1), 0.1, weight)
    with pytest.raises(ValueError, match="beta must be positive"):
        modpo_loss(torch.zeros(1), torch.zeros(1), 0.0, 0.5)


# ---- sequence_log_probs ----------------------------------------------------------------------------------------------

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
    assert losses._split_head(model) is None
    torch.testing.assert_close(
        sequence_log_probs(model, *data).double(), plain_log_probs(model, *data), rtol=1e-5, atol=1e-4
    )
