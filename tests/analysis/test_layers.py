# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from pandas.testing import assert_frame_equal
from tiny_models import FAMILIES, make_model, make_tokens
from torch.nn import Linear, ReLU, Sequential
from transformers import AutoModelForCausalLM, AutoTokenizer

from cat_modifier.analysis import TRANSFORMS, analyze
from cat_modifier.analysis.experts import make_experts_linears
from cat_modifier.analysis.schemes import Scheme
from cat_modifier.analysis.summary import best_transform, diagnose, sentences
from cat_modifier.calibration.texts import EMBEDDED, load_texts, windows
from cat_modifier.functional.sqnr import alignment, energy, to_db

ALL = list(TRANSFORMS)


def column(frame, transform, scheme, name):
    rows = frame[(frame["transform"] == transform) & (frame["scheme"] == scheme)]
    return rows.set_index("layer")[name]


@pytest.fixture(scope="module")
def real(embedded_model):
    """The real model, and 16 windows of 512 tokens"""
    model = AutoModelForCausalLM.from_pretrained(embedded_model, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model)
    return model, windows(load_texts(EMBEDDED, "train"), tokenizer, 512, 16)


@pytest.fixture(scope="module")
def results(real):
    """Takes about half a minute"""
    model, ids = real
    schemes = ["W4A4", "W4A8", "W8A8"]
    return analyze(model, ids.split(4), schemes, ["none", "hadamard", "cat"])


@pytest.mark.parametrize(
    ("transform", "scheme", "median", "ninetieth"),
    [
        ("none", "W4A4", 0.5, 2.5),
        ("none", "W4A8", 0.2, 1.2),
        ("none", "W8A8", 0.1, 0.3),
        ("hadamard", "W4A4", 0.1, 0.4),
        ("hadamard", "W4A8", 0.1, 0.4),
        ("hadamard", "W8A8", 0.1, 0.4),
    ],
)
def test_prediction_is_what_is_measured_on_the_real_model(
    results, transform, scheme, median, ninetieth
):
    """The paper's figure 2: difference over all Linears, dB"""
    error = column(results, transform, scheme, "measured_db") - column(
        results, transform, scheme, "predicted_db"
    )
    assert len(error) == 210
    assert error.abs().median() < median
    assert error.abs().quantile(0.9) < ninetieth


def test_outliers_of_the_prediction_are_explained_by_their_rounding_noise(real, results):
    """
    Lemma 2.2 assumes uniform rounding noise. Where most values round to zero, the noise is
    smaller. The measurement is above the prediction by the same factor.
    """
    rows = results[results["transform"] == "none"]
    off = rows[(rows["measured_db"] - rows["predicted_db"]).abs() > 3]
    assert len(off) > 0
    assert (off["measured_db"] > off["predicted_db"]).all()

    model, ids = real
    names = set(off["layer"])
    inputs = {}

    def keep(name):
        return lambda module, args: inputs.setdefault(name, []).append(args[0].flatten(0, 1))

    handles = [
        module.register_forward_pre_hook(keep(name))
        for name, module in model.named_modules()
        if name in names
    ]
    with torch.no_grad():
        for batch in ids.split(4):
            model(batch, use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()

    error = column(results, "none", "W4A4", "measured_activations_db") - column(
        results, "none", "W4A4", "predicted_activations_db"
    )
    for name in names:
        x = torch.cat(inputs[name]).float()
        step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 15
        noise = (x / step).round() * step - x
        uniform = x.shape[-1] * step.square().sum() / 12
        below_uniform = to_db((uniform / noise.square().sum()).item())
        assert below_uniform == pytest.approx(error[name], abs=2.5)
        to_zero = (x / step).round().eq(0).float().mean(-1)
        assert torch.sum(to_zero * step.squeeze().square()) > 0.7 * step.square().sum()


def test_rotations_keep_the_alignment_of_the_real_model(results):
    before = column(results, "none", "W4A4", "alignment_db")
    after = column(results, "hadamard", "W4A4", "alignment_db")
    assert (after - before).abs().max() < 0.02


def test_cat_comes_near_the_best_alignment_of_the_real_model(results):
    loss = column(results, "cat", "W4A4", "achievable_block_db") - column(
        results, "cat", "W4A4", "alignment_db"
    )
    assert loss.min() > -1e-3
    assert loss.median() < 1  # q, k and v share one transform, and so do gate and up


def test_cat_is_better_than_hadamard_on_the_real_model(results):
    assert best_transform(results, "W4A4") == "cat"
    gain = column(results, "cat", "W4A4", "measured_db") - column(
        results, "hadamard", "W4A4", "measured_db"
    )
    assert gain.mean() > 3


def test_summary_of_the_real_model(results):
    scheme = Scheme.parse("W4A4")
    plain = diagnose(results, scheme, "none")
    assert plain["limit"].value_counts().idxmax() == "concentration of activations"
    assert plain["sqnr"].is_monotonic_increasing
    best = diagnose(results, scheme, "cat")
    assert best["limit"].value_counts().idxmax() == "bits"
    # removing one of two equal noises gains 3 dB
    assert best["gain_activations"].between(0, 8).all()
    text = " ".join(sentences(results, scheme))
    assert "highest with CAT" in text and "Hadamard" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_all_transforms_on_all_families(family, tmp_path):
    overrides = {"num_experts": 4, "num_experts_per_tok": 2} if "moe" in family else {}
    model = make_model(tmp_path, family, **overrides)
    make_experts_linears(model)
    tokens = make_tokens(8, 48)
    frame = analyze(model, tokens.split(2), ["W8A8", "W4G8A4G8"], ALL, transform_block_size=16)
    assert any("experts.3.down_proj" in name for name in frame["layer"]) == ("moe" in family)
    counts = frame.groupby("layer").size()
    assert (counts == 2 * len(ALL)).all()
    assert torch.isfinite(torch.tensor(frame["measured_db"].to_numpy())).all()
    error = frame.loc[frame["scheme"] == "W8A8", ["measured_db", "predicted_db"]]
    assert (error["measured_db"] - error["predicted_db"]).abs().median() < 0.3

    q = frame.loc[frame["layer"].str.endswith("0.self_attn.q_proj"), "input"]
    v = frame.loc[frame["layer"].str.endswith("0.self_attn.v_proj"), "input"]
    assert set(q) == set(v)  # one input, one transform
    block, full = frame["achievable_block_db"], frame["achievable_full_db"]
    assert (block <= full + 1e-3).all()
    is_block = ~frame["transform"].eq("cat-full")
    assert (frame["alignment_db"] <= block + 1e-3)[is_block].all()
    assert (frame["alignment_db"] <= full + 1e-3).all()


def test_experts_which_are_no_linears_are_refused_and_not_forgotten(tmp_path):
    model = make_model(tmp_path, "qwen3-moe")
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts \(one of 2\) holds"):
        analyze(model, [make_tokens()])
    frame = analyze(model, [make_tokens()], ["W4A4"], ["none"], ignore=["re:.*experts"])
    assert len(frame) == 9  # attention and the head


def test_few_massive_tokens_do_not_make_the_numbers_noisy():
    """Alignment covers all tokens, although few tokens are sampled"""
    torch.manual_seed(0)
    x = torch.randn(40_000, 24) * torch.randn(40_000, 1).exp()
    x[::500, 5] *= 300
    linear = Linear(24, 48, bias=False)
    frame = analyze(Sequential(linear), x.split(1000), ["W8A8"], ["none", "cat"])
    plain = frame[frame["transform"] == "none"].iloc[0]
    with torch.no_grad():
        exact = alignment(energy(linear(x)), linear.weight.square().sum().item(), energy(x))
    assert plain["alignment_db"] == pytest.approx(to_db(exact), abs=0.1)
    largest = x.square().sum(-1).max().item() / energy(x)
    assert plain["largest_token"] == pytest.approx(largest, rel=1e-3)


def test_groups_are_compared_with_groups_of_normal_data():
    torch.manual_seed(0)
    x = torch.randn(2000, 256)
    frame = analyze(Sequential(Linear(256, 256)), [x], ["W4G32A4G32"], ["none"])
    [row] = diagnose(frame, Scheme.parse("W4G32A4G32"), "none").to_dict("records")
    # weights are uniform, and fill their ranges better than normal data
    assert row["concentration_loss"] == pytest.approx(0, abs=0.3)


def test_a_dead_linear_does_not_hide_the_others():
    model = Sequential(Linear(24, 24), Linear(24, 8))
    with torch.no_grad():
        model[0].weight.zero_()
    frame = analyze(model, [torch.randn(50, 24)], ["W4A4"], ["none", "cat"])
    assert frame.loc[frame["layer"] == "0", "measured_db"].isna().all()
    assert "nothing: no signal" in set(diagnose(frame, Scheme.parse("W4A4"), "cat")["limit"])
    assert "inf" not in " ".join(sentences(frame, Scheme.parse("W4A4")))


def test_whole_blocks_have_nothing_to_gain_from_whole_blocks():
    torch.manual_seed(0)
    x = torch.randn(3000, 32) @ torch.randn(32, 32)
    frame = analyze(
        Sequential(Linear(32, 64)), [x], ["W4A4"], ["cat", "cat-full"], transform_block_size=4
    )
    gains = {
        name: diagnose(frame, Scheme.parse("W4A4"), name)["gain_full"][0]
        for name in ("cat", "cat-full")
    }
    assert gains["cat"] > 0.5 and gains["cat-full"] == pytest.approx(0, abs=0.1)


def test_any_module_with_linears():
    model = Sequential(Linear(24, 48), ReLU(), Linear(48, 8))
    frame = analyze(model, torch.randn(6, 40, 24).unbind(), ["W4A4"])
    assert list(frame["layer"].unique()) == ["0", "2"]
    weights_only = analyze(model, torch.randn(2, 40, 24).unbind(), ["W4A16"], ["none"])
    assert (weights_only["measured_activations_db"] == float("inf")).all()
    assert weights_only["activation_concentration_db"].isna().all()


def test_padding_is_left_out(tmp_path):
    model = make_model(tmp_path)
    tokens = make_tokens(4, 32)
    mask = torch.ones_like(tokens)
    mask[:, 20:] = 0
    padded = analyze(model, [{"input_ids": tokens, "attention_mask": mask}], ["W4A4"], ["cat"])
    plain = analyze(model, [tokens[:, :20]], ["W4A4"], ["cat"])
    assert (padded["tokens"] == 80).all()
    assert_frame_equal(padded, plain, rtol=1e-2)


## Bad input ##


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schemes": ["W4A99"]}, "Unknown scheme 'W4A99'"),
        ({"transforms": ["fourier"]}, "Unknown transform 'fourier': it should be one of none"),
        ({"targets": ["re:.*nothing.*"]}, "no torch.nn.Linear for targets"),
        ({"schemes": []}, "at least one scheme, one transform and one batch"),
        ({"batches": []}, "at least one scheme, one transform and one batch"),
        ({"schemes": ["W4G7A4"]}, "Groups of 7 channels .* do not divide the 24 inputs of 0"),
        ({"transform_block_size": 0}, "must be positive"),
    ],
)
def test_bad_input_is_an_error(arguments, message):
    model = Sequential(Linear(24, 8))
    with pytest.raises(ValueError, match=message):
        analyze(model, **({"batches": [torch.randn(5, 24)]} | arguments))


def test_weights_and_inputs_that_are_not_finite_are_an_error():
    model = Sequential(Linear(24, 8))
    with pytest.raises(ValueError, match="input of 0 has values that are not finite"):
        analyze(model, [torch.full((5, 24), float("nan"))])
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="0 has values that are not finite"):
        analyze(model, [torch.randn(5, 24)])


def test_linears_that_saw_nothing_are_named_and_the_others_kept(logs):
    class Model(Sequential):
        def forward(self, x):
            return self[0](x)

    model = Model(Linear(24, 8), Linear(24, 8))
    results = analyze(model, [torch.randn(50, 24)], ["W4A4"], ["none"])
    assert list(results["layer"]) == ["0"]
    assert "1 Linears saw no tokens and are not in the results: 1. Use more" in logs[0]
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="2 Linears saw no tokens"):
        analyze(model, [torch.randn(50, 24)], ["W4A4"], ["none"])


def test_inputs_of_zeros_have_no_sqnr():
    frame = analyze(Sequential(Linear(24, 8)), [torch.zeros(5, 24)], ["W4A4"])
    assert frame["predicted_db"].isna().all()
