"""Single operators against the original's, on inputs that show a wrong epsilon."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from iv2_jax.interop.entries import build_entries, from_torch
from iv2_jax.models.attention import Attention, AttentionPool
from iv2_jax.models.layers import LayerNorm, RMSNorm
from iv2_jax.models.student import AlignmentDecoder
from tests.parity import goldens

NORM = [("norm/scale", "norm.weight", "C"), ("norm/bias", "norm.bias", "C")]
DECODER_RULES = {
    "linear": [("fc/kernel", "head.weight", "D C -> C D"), ("fc/bias", "head.bias", "C"), *NORM],
    "mlp": [
        ("fc1/kernel", "head.0.weight", "D D' -> D' D"),
        ("fc1/bias", "head.0.bias", "D"),
        ("fc2/kernel", "head.2.weight", "D C -> C D"),
        ("fc2/bias", "head.2.bias", "C"),
        *NORM,
    ],
}
ATTENTION_RULES = [
    ("qkv/kernel", "qkv.weight", "D 3 h d -> (3 h d) D"),
    ("qkv/bias", "qkv.bias", "3 h d -> (3 h d)"),
    ("q_norm/scale", "q_norm.weight", "D"),
    ("k_norm/scale", "k_norm.weight", "D"),
    ("proj/kernel", "proj.weight", "h d D -> D (h d)"),
    ("proj/bias", "proj.bias", "D"),
]
POOL_RULES = [
    ("proj/kernel", "cross_attn.proj.weight", "h d C -> C (h d)"),
    ("proj/bias", "cross_attn.proj.bias", "C"),
    *[
        rule
        for n in "qkv"
        for rule in (
            (f"norm_{n}/scale", f"norm1_{n}.weight", "D"),
            (f"norm_{n}/bias", f"norm1_{n}.bias", "D"),
            (f"{n}/kernel", f"cross_attn.{n}.weight", "D h d -> (h d) D"),
            (f"{n}/bias", f"cross_attn.{n}_bias", "h d -> (h d)"),
        )
    ],
]


@pytest.fixture(scope="module")
def case(golden):
    return golden("ops")


def _params(case, prefix, rules, sizes):
    weights = {k: v for k, v in case.weights.items() if k.startswith(prefix)}
    return {"params": from_torch(weights, build_entries(rules, sizes, 0, key_prefix=prefix))}


def _rows_close(ours, reference, what):
    """Each row against its own magnitude: rows differ by orders, and a global limit hides them."""
    ours, reference = np.asarray(ours), np.asarray(reference)
    for i, (a, b) in enumerate(zip(ours, reference, strict=True)):
        goldens.assert_close(a, b, goldens.OUTPUT_LIMIT, f"{what}, row {i}")


def test_rms_norm(case):
    weight = case.inputs["norm_weight"]
    ours = RMSNorm(len(weight)).apply({"params": {"scale": weight}}, case.inputs["x"])
    _rows_close(ours, case.outputs["block_rmsnorm_eps1e-6"], "RMSNorm")


@pytest.mark.parametrize("epsilon", ["1e-05", "1e-06", "1e-12"])
def test_layer_norm(case, epsilon):
    weight, bias = case.inputs["norm_weight"], case.inputs["norm_bias"]
    norm = LayerNorm(len(weight), epsilon=float(epsilon))
    ours = norm.apply({"params": {"scale": weight, "bias": bias}}, case.inputs["x"])
    # Relative to the whole tensor: a constant row leaves only rounding of its mean, which an
    # epsilon of 1e-12 magnifies.
    reference = case.outputs[f"layernorm_eps{epsilon}"]
    goldens.assert_close(ours, reference, goldens.OUTPUT_LIMIT, f"LayerNorm {epsilon}")


@pytest.mark.parametrize(("name", "approximate"), [("gelu_erf", False), ("gelu_tanh", True)])
def test_gelu(case, name, approximate):
    ours = jax.nn.gelu(case.inputs["act_x"], approximate=approximate)
    goldens.assert_close(ours, case.outputs[name], goldens.OUTPUT_LIMIT, name)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_decoders(case, kind):
    reference = case.outputs[f"{kind}_decoder"]
    x = case.inputs["x"]
    sizes = {"D": x.shape[-1], "C": reference.shape[-1]}
    decoder = AlignmentDecoder(sizes["D"], "embed", sizes["C"], kind)
    params = _params(case, f"{kind}_decoder.", DECODER_RULES[kind], sizes)
    ours = jax.jit(decoder.apply)(params, x)
    _rows_close(ours, reference, f"{kind} decoder")


def _some_head_count(width, error_of):
    """Whether any head count reproduces the reference: the header does not record the count."""
    counts = [4, *(n for n in range(2, width) if n != 4)]
    return any(error_of(n) < goldens.OUTPUT_LIMIT for n in counts if width % n == 0)


def test_self_attention(case):
    x = case.inputs["x"][None]
    width = x.shape[-1]

    def error(heads):
        sizes = {"D": width, "h": heads, "d": width // heads}
        params = _params(case, "self_attn.", ATTENTION_RULES, sizes)
        ours = jax.jit(Attention(width, heads, qkv_bias=True).apply)(params, x)
        return goldens.relative_error(ours, case.outputs["self_attn_qknorm"])

    assert _some_head_count(width, error)


def test_attention_pool(case):
    x = np.stack([case.inputs["x"], 0.1 * case.inputs["x"][::-1]])
    width, out_width = x.shape[-1], case.outputs["attn_pool"].shape[-1]

    def error(heads):
        sizes = {"D": width, "C": out_width, "h": heads, "d": width // heads}
        params = _params(case, "attn_pool.", POOL_RULES, sizes)
        pooled, attention = jax.jit(AttentionPool(width, heads, out_width).apply)(params, x)
        np.testing.assert_allclose(attention.sum(1), 1.0, rtol=1e-6)
        return goldens.relative_error(pooled, case.outputs["attn_pool"])

    assert _some_head_count(width, error)
