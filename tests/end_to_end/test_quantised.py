"""Libraries that pack weights or compute in few bits, as they come; each test needs the package that it is about."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from float8 import needs_scales_of_rows
from memory_probe import saved_bytes
from numerics import gradients, looped, relative_error
from torch import nn

import mst_fx
from mst_fx.core.values import plain_tensors

pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages
TOKENS, HIDDEN, WIDE = 48, 64, 256


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.gate, self.up = (nn.Linear(HIDDEN, WIDE, bias=False) for _ in range(2))
        self.down = nn.Linear(WIDE, HIDDEN, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Adapted(nn.Module):
    """A linear layer, and an adapter of low rank."""

    def __init__(self, base, dtype):
        super().__init__()
        self.base = base
        self.narrow = nn.Linear(base.in_features, 4, bias=False, dtype=dtype)
        self.widen = nn.Linear(4, base.out_features, bias=False, dtype=dtype)

    def forward(self, x):
        return self.base(x) + self.widen(self.narrow(x))


def layer(dtype=torch.float32):
    torch.manual_seed(0)
    return Mlp().to(dtype)


def adapted(model, dtype=torch.float32):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in ("gate", "up", "down"):
        setattr(model, name, Adapted(getattr(model, name), dtype))
    return model


def report_beside_plain(model, inputs, step):
    """The report of the one compile, and its step; gradients are those of torch.compile without mst_fx."""

    def run(*given):
        return step(model, *given)

    torch._dynamo.reset()
    plain = gradients(model, torch.compile(run, backend="aot_eager"), inputs)
    made, ours = len(mst_fx.reports()), looped(run, inner="aot_eager")
    given = gradients(model, ours, inputs)
    assert given.keys() == plain.keys()
    eps = max(torch.finfo(parameter.dtype).eps for parameter in model.parameters() if parameter.is_floating_point())
    for name, expected in plain.items():
        assert relative_error(given[name], expected) <= 32 * eps, name
    (report,) = mst_fx.reports()[made:]
    return report, ours


def mean_square(model, x):
    return model(x).float().square().mean()


def tokens(dtype=torch.float32):
    return torch.randn(2, TOKENS, HIDDEN, dtype=dtype, requires_grad=True)


def assert_looped(model, dtype=torch.float32):
    """One loop has the right gradients; no wide value of the tokens is saved, and no weight in another form."""
    x = tokens(dtype)
    report, step = report_beside_plain(model, (x,), mean_square)
    assert [region.pattern for region in report.regions] == ["gated_mlp"]
    assert not report.refusals
    assert all(WIDE not in value.shape for value in report.unlooped)
    known = [plain for given in (x, *model.parameters(), *model.buffers()) for plain in plain_tensors(given)]
    saved = saved_bytes(lambda: step(x), known)
    assert saved < 3 * x.nbytes < x.nbytes * WIDE // HIDDEN
    return report


# --- bitsandbytes: packed weights that a custom function multiplies with


def in_bits(linear, bits):
    bnb = pytest.importorskip("bitsandbytes")
    sizes = (linear.in_features, linear.out_features)
    if bits == "8bit":
        return bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
    kind, twice = bits
    return bnb.nn.Linear4bit(
        *sizes, bias=False, compute_dtype=torch.float32, quant_type=kind, compress_statistics=twice
    )


def quantise(module, bits):
    for name, child in module.named_children():
        if isinstance(child, nn.Linear) and name != "lm_head":
            packed = in_bits(child, bits)
            packed.weight.data = child.weight.data
            setattr(module, name, packed)
        else:
            quantise(child, bits)
    return module.to("cpu")  # packs the weights


@pytest.mark.parametrize("bits", [("nf4", False), "8bit"], ids=str)
def test_packed_weights_with_adapters(bits):
    (region,) = assert_looped(adapted(quantise(layer(), bits))).regions
    assert region.verified


def test_int8_products_as_a_gpu_takes_them_are_refused():
    """The op that packs the tokens has no rule."""
    bnb = pytest.importorskip("bitsandbytes")
    multiply = bnb.autograd._functions.MatMul8bitLt
    model, made = quantise(layer(), "8bit"), len(mst_fx.reports())
    for linear in (model.gate, model.down):
        linear.init_8bit_state()

    def mlp(x):
        wide = multiply.apply(x, model.gate.weight, None, None, model.gate.state)
        return multiply.apply(F.silu(wide), model.down.weight, None, None, model.down.state).sum()

    torch._dynamo.reset()
    looped(mlp, inner="eager")(tokens())
    (report,) = mst_fx.reports()[made:]
    assert not report.regions
    assert report.unlooped[0].reason == "UNKNOWN_OP"
    assert "bitsandbytes.int8_vectorwise_quant.default has no placement rule" in report.unlooped[0].why


@pytest.mark.slow
def test_a_llama_with_packed_weights_and_adapters_as_peft_makes_them():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from transformer_models import SIZES, V, loss_of

    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": 1}
    base = quantise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), ("nf4", True))
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    model, ids = peft.get_peft_model(base, config).train(), torch.randint(0, V, (2, TOKENS))
    report, _ = report_beside_plain(model, (ids, ids), loss_of)
    assert [(region.pattern, region.verified) for region in report.regions] == [("gated_mlp", True), ("head", True)]
    assert report.regions[0].module == "base_model.model.model.layers.0.mlp"
    assert not report.refusals


# --- torchao: float8 products with scales that are found anew


def in_float8(model, recipe, emulate):
    float8 = pytest.importorskip("torchao.float8")
    config = replace(float8.Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    return float8.convert_to_float8_training(model, config=config)


def test_a_scale_a_row_is_looped():
    """Each token has its scale; the gradients of weights come of products in high precision."""
    assert_looped(in_float8(layer(), "rowwise_with_gw_hp", emulate=True))


@needs_scales_of_rows
def test_a_scale_a_row_of_frozen_weights_is_looped():
    """The scales of the gradients of weights would be of all tokens, but nobody asks for these gradients."""
    model = in_float8(layer(torch.bfloat16), "rowwise", emulate=False)
    assert_looped(adapted(model, torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize(
    ("recipe", "words", "others"),
    [
        ("tensorwise", ["aten.max.default reduces over the split dim"], ["backward"]),
        ("rowwise", ["aten.amax.default reduces over the split dim, in a backward of its own"], []),
    ],
)
def test_a_scale_of_several_tokens_is_refused(recipe, words, others):
    """One scale for all tokens in the forward; in the backward, one of all tokens for each row of a weight."""
    report, _ = report_beside_plain(in_float8(layer(), recipe, emulate=True), (tokens(),), mean_square)
    assert not report.regions
    assert {refusal.reason for refusal in report.refusals} == {"AXIS_MIXED"}
    for refusal in report.refusals:
        assert refusal.source.endswith("output = matmul_with_hp_or_float8_args.apply(")
        assert all(word in refusal.text for word in words), refusal.text
        assert not any(word in refusal.text for word in others), refusal.text
    assert {value.op for value in report.unlooped} >= {
        "torchao.float8.float8_linear.matmul_with_hp_or_float8_args.apply"
    }


# --- torchao: weights that are tensors of tensors


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_that_are_tensors_of_tensors(bits):
    quantization = pytest.importorskip("torchao.quantization")
    eight = quantization.Int8WeightOnlyConfig(version=2)
    four = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32))
    model = layer().requires_grad_(False)
    quantization.quantize_(model, eight if bits == 8 else four)
    (region,) = assert_looped(adapted(model)).regions
    assert region.verified == (bits == 8), region.verification  # the op for 4 bits takes no float64


# --- Liger: Triton kernels that a custom function calls


def test_kernels_that_dynamo_cannot_capture_end_the_graph():
    """Without a GPU there are no kernels: Dynamo ends the graph before them, and the report names the place."""
    swiglu = pytest.importorskip("liger_kernel.ops.swiglu")
    if torch.cuda.is_available():
        pytest.skip("there, the kernels are captured")
    model, made = layer(), len(mst_fx.reports())

    def mlp(x):
        return model.down(swiglu.LigerSiLUMulFunction.apply(model.gate(x), model.up(x))).sum()

    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="active drivers"):
        looped(mlp)(tokens())
    report = mst_fx.reports()[made]
    assert not report.regions
    assert all("graph break" in value.why and "triton" in value.why for value in report.unlooped)
