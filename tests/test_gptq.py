import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.quantizers.affine import GroupSizeError, decibel, fit_qparams, on_grid, output_error, search_qparams
from helpers.quantizers.gptq import HessianError, damped, feedback_factor, gptq, gptq_columns, rounding_order, targets


def problem(rows=48, width=256, seed=0):
    """A weight and a Gram matrix of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * width, width, generator=g) @ torch.randn(width, width, generator=g) * torch.rand(width, generator=g)
    return torch.randn(rows, width, generator=g) * 0.02, X.T @ X / len(X)


def error(W, solution, H):
    return output_error(W - solution.quantized.dequantize(), H)


def test_output_error_is_the_output_error():
    W, X = torch.randn(3, 4), torch.randn(4, 50)
    assert output_error(W, X @ X.T) == pytest.approx((W @ X).square().sum().item(), rel=1e-5)
    assert decibel(1.0, 100.0) == -20


def test_one_column_by_hand():
    """Two inputs of correlation 1/2: what the first column is off by, the second takes over by half."""
    W, H = torch.tensor([[0.4, 0.0, 3.0, -3.0]]), torch.eye(4)
    H[0, 1] = H[1, 0] = 0.5
    q = gptq(W, H, bits=2, group_size=-1, sym=True, damp_percent=0.0).quantized  # scale 2, zero 2: values -4, -2, 0, 2
    # 0.4 -> 0, off by 0.4; then 0 + 0.4 / 2 -> 0
    assert q.dequantize().tolist() == [[0.0, 0.0, 2.0, -4.0]]
    F = feedback_factor(H)
    assert F[1, 0] == 0.5 and torch.equal(F.diagonal(), torch.ones(4))


@pytest.mark.parametrize("options", [{}, {"group_size": -1}, {"desc_act": True}, {"act_group_aware": True}, {"sym": False},
                                     {"bits": 3}, {"group_size": 256, "block_size": 256}], ids=str)
def test_both_forms_are_one_algorithm(options):
    W, H = problem(width=512)
    options = dict(options)
    block_size = options.pop("block_size", 128)
    fast, columns = gptq(W, H, **options), gptq_columns(W, H, **options, block_size=block_size)
    # a rounding that tips the other way changes later ones
    assert (fast.quantized.codes == columns.quantized.codes).float().mean() > 0.97
    assert error(W, fast, H) == pytest.approx(error(W, columns, H), rel=0.01)
    assert torch.equal(fast.quantized.g_idx, columns.quantized.g_idx)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("desc_act", [False, True])
def test_better_than_rounding_and_not_rounding(group_size, desc_act):
    W, H = problem()
    solved = gptq(W, H, 4, group_size, desc_act=desc_act)
    rounded = on_grid(W, fit_qparams(W, 4, group_size))
    assert error(W, solved, H) < 0.75 * output_error(W - rounded.dequantize(), H)
    assert (solved.quantized.codes != rounded.codes).any()


def test_searched_scales_lower_the_error():
    W, H = problem()
    assert error(W, gptq(W, H, search=True), H) < 0.95 * error(W, gptq(W, H), H)
    importance = H.diagonal()
    widest, searched = fit_qparams(W, 4, 128), search_qparams(W, importance, 4, 128)
    weighted = [((W - on_grid(W, g).dequantize()).square() * importance).sum() for g in (widest, searched)]
    assert weighted[1] < weighted[0] and (searched.scale.abs() <= widest.scale).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_symmetric_grids_turn_to_where_the_weights_are(bits):
    """2^(bits-1) steps lie on one side of zero: a negative scale turns them to the largest weight if that is positive."""
    W = torch.arange(-(2 ** (bits - 1) - 1), 2 ** (bits - 1) + 1).float()[None]
    for weights, sign in ((W, -1), (-W, 1)):
        grid = search_qparams(weights, torch.ones(W.shape[1]), bits)
        assert grid.scale.item() == sign and torch.equal(on_grid(weights, grid).dequantize(), weights)
        above = search_qparams(weights, torch.ones(W.shape[1]), bits, negative=False)
        assert above.scale.item() > 0 and not torch.allclose(on_grid(weights, above).dequantize(), weights, atol=0.01)


def test_negative_scales_lower_the_error_of_gptq():
    W, H = problem()
    above, either = (gptq(W, H, search=True, negative=n) for n in (False, True))
    assert error(W, either, H) < 0.97 * error(W, above, H)
    assert (above.quantized.grid.scale > 0).all() and 0.3 < (either.quantized.grid.scale < 0).float().mean() < 0.7
    stored = either.quantized.stored()
    assert torch.equal(stored.grid.scale, either.quantized.grid.scale.half().float())


@pytest.mark.parametrize("options", [{}, {"desc_act": True, "search": True}, {"act_group_aware": True},
                                     {"sym": False, "bits": 3}], ids=str)
def test_targets_are_what_was_rounded(options):
    """Recomputed from the errors alone: within half a step of each code, though the weight itself often is not."""
    W, H = problem()
    found = gptq(W, H, **options)
    q = found.quantized
    steps = targets(W, H, found, rounding_order(H, 128, options.get("desc_act", False), options.get("act_group_aware", False)))
    assert torch.equal(steps.round(), q.codes)
    own = W / q.grid.scale[:, q.g_idx] + q.grid.zero_point[:, q.g_idx]
    inside = [((x - q.codes).abs() < 0.499).float().mean() for x in (steps, own)]
    assert inside[0] > 0.97 and inside[1] < 0.8


def test_stacking_linears_changes_nothing():
    W, H = problem(rows=64)
    whole, parts = gptq(W, H).quantized, [gptq(w, H).quantized for w in W.split(32)]
    assert torch.equal(whole.codes, torch.cat([p.codes for p in parts]))


def test_dead_columns():
    W, H = problem()
    H[5], H[:, 5] = 0, 0
    assert (gptq(W, H).quantized.dequantize()[:, 5] == 0).all() and (gptq_columns(W, H).quantized.dequantize()[:, 5] == 0).all()


@pytest.mark.parametrize("name", ["rank one", "singular", "badly conditioned", "duplicate"])
def test_difficult_hessians_give_finite_results_with_the_damping_on_record(name):
    W, H = problem(width=64)
    v = torch.randn(64, 1)
    H = {"rank one": v @ v.T, "singular": torch.ones(64, 64), "badly conditioned": H * torch.logspace(0, 9, 64).outer(
        torch.logspace(0, 9, 64)), "duplicate": H[:, [0] * 64][[0] * 64]}[name]
    for solve in (gptq, gptq_columns):
        solution = solve(W, H, group_size=32, damp_percent=1e-8)
        assert torch.isfinite(solution.quantized.dequantize()).all() and 1e-8 <= solution.damp_percent <= 1


@pytest.mark.parametrize("H, said", [(torch.zeros(64, 64), "no calibration token"), (torch.full((64, 64), torch.nan), "NaN"),
                                     (-torch.eye(64), "negative"), (torch.eye(64) - 3, "negative")], ids=range(4))
def test_hopeless_hessians_are_refused(H, said):
    with pytest.raises(HessianError, match=said):
        gptq(torch.randn(4, 64), H, group_size=32)


def test_indefinite_hessian_is_refused_or_damped():
    H = torch.eye(64)
    H[0, 1] = H[1, 0] = 1.5  # no Gram matrix: even a damping of 1 barely mends it
    assert gptq(torch.randn(4, 64), H, group_size=32).damp_percent > 0.4
    H[0, 1] = H[1, 0] = 5.0
    with pytest.raises(HessianError, match="could not be factorised"):
        gptq(torch.randn(4, 64), H, group_size=32)


def test_damping():
    H, dead = damped(torch.diag(torch.tensor([2.0, 0.0, 4.0])), 0.1)
    assert dead.tolist() == [False, True, False]
    assert torch.allclose(H.diagonal(), torch.tensor([2.0, 1, 4]) + 0.1 * 7 / 3)


def test_bad_weights():
    with pytest.raises(GroupSizeError, match="does not divide the 64 inputs"):
        gptq(torch.randn(4, 64), torch.eye(64), group_size=48)
    with pytest.raises(ValueError, match="NaN or infinite"):
        gptq(torch.full((4, 64), torch.inf), torch.eye(64), group_size=32)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 9), groups=st.integers(1, 4), group_size=st.sampled_from([1, 2, 8, 32]), bits=st.integers(2, 8),
       sym=st.booleans(), kind=st.sampled_from(["normal", "constant", "positive", "zero", "tiny"]), seed=st.integers(0, 99))
def test_any_shape_and_kind_gives_codes_in_range(rows, groups, group_size, bits, sym, kind, seed):
    W, H = problem(rows, groups * group_size, seed)
    W = {"normal": W, "constant": torch.full_like(W, 0.3), "positive": W.abs(), "zero": 0 * W, "tiny": W * 1e-30}[kind]
    for search in (False, True):
        q = gptq(W, H, bits, group_size, sym, search=search).quantized
        assert q.codes.min() >= 0 and q.codes.max() < 2**bits and torch.isfinite(q.dequantize()).all()
        if kind == "zero":
            assert (q.dequantize() == 0).all()


@pytest.mark.parametrize("solve", [gptq, gptq_columns])
def test_desc_act_begins_with_the_largest_inputs(solve):
    torch.manual_seed(0)
    X = torch.randn(200, 64) * torch.rand(64)
    found = solve(torch.randn(8, 64), X.T @ X, group_size=32, desc_act=True).quantized
    first = (found.g_idx == 0).nonzero().squeeze(1)
    assert set(first.tolist()) == set(X.square().sum(0).topk(32).indices.tolist())


def test_group_aware_order_by_hand():
    H = torch.diag(torch.tensor([1.0, 2, 3, 9, 0, 5, 4, 4]))
    assert rounding_order(H, 2, act_group_aware=True).tolist() == [3, 2, 5, 4, 6, 7, 1, 0]
    assert rounding_order(H, 4, act_group_aware=True).tolist() == [3, 2, 1, 0, 5, 6, 7, 4]
    both = (rounding_order(H, -1, act_group_aware=True), rounding_order(H, -1, desc_act=True))
    assert H.diagonal()[both[0]].tolist() == H.diagonal()[both[1]].tolist()


@pytest.mark.parametrize("solve", [gptq, gptq_columns])
def test_group_aware_order_leaves_groups_where_they_are(solve):
    """The columns permuted beforehand, rounded as they are, and put back: the same, and each group in its place."""
    W, H = problem()
    found = solve(W, H, group_size=32, act_group_aware=True).quantized
    order = rounding_order(H, 32, act_group_aware=True)
    plain = solve(W[:, order], H[order][:, order], group_size=32).quantized
    assert torch.equal(found.dequantize()[:, order], plain.dequantize())
    assert torch.equal(found.g_idx, torch.arange(256) // 32)


def test_group_aware_order_is_gptqmodels():
    gar = pytest.importorskip("gptqmodel.quantization.gar")
    H = problem()[1]
    inside, size = gar.compute_local_perms(H.diagonal(), 32, return_values=True)
    theirs = gar.compose_final_perm(inside, gar.compute_global_perm(H.diagonal(), 32, precomputed_values=size), 32)
    assert torch.equal(rounding_order(H, 32, act_group_aware=True), theirs)
