"""Everything is computed where the weights are: no tensor of the CPU gets in, on a pretended device that refuses it."""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers.methods.gptq import Gptq
from helpers.methods.keep import Keep
from helpers.models.method import Gram, Method
from helpers.models.quantize import quantize_model
from helpers.quantizers import packing
from helpers.quantizers.nf4 import dequantize_nf4, quantize_nf4
from tests.elsewhere import ELSEWHERE, Elsewhere, There


def there(model):
    """A copy of a model whose parameters and buffers are elsewhere."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, torch.nn.Parameter(There(p.detach().clone()), requires_grad=False))
        for name, b in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, There(b.clone()), persistent=False)
    return model


def test_the_pretended_device_refuses_what_a_gpu_would():
    with Elsewhere():
        x = There(torch.arange(6.0).view(2, 3))
        assert x.device == ELSEWHERE and (x + 1).device == ELSEWHERE and (x @ x.T).held.tolist() == [[5, 14], [14, 50]]
        assert torch.zeros(2, device=x.device).held.tolist() == [0, 0] and x.sum().item() == 15 and (x > 2).any()
        for bad in (lambda: x + torch.ones(3), lambda: x[torch.tensor([0])], lambda: torch.cat([x, torch.ones(2, 3)])):
            with pytest.raises(RuntimeError, match="of the CPU meets one elsewhere"):
                bad()


@pytest.mark.parametrize("name", sorted(set(Method.known) - {"fp16"}))
def test_every_method_computes_where_the_weights_are(tiny, name):
    """The same codes as on the CPU, and nothing of the CPU in between: embedding, blocks, Gram matrices, solver, folds."""
    kind = Method.known[name]
    method = kind(**{n: v for n, v in {"group_size": 64, "steps": 2}.items() if hasattr(kind, n)})
    tokens = [tuple(range(n, n + 32)) for n in (5, 105, 305, 705)]
    here = copy.deepcopy(tiny)
    with sdpa_kernel(SDPBackend.MATH):  # what the pretended device has
        expected = quantize_model(here, method, tokens)
    with Elsewhere():
        model = there(tiny)
        found = quantize_model(model, method, tokens)
        assert found.tokens == expected.tokens and found.codes.keys() == expected.codes.keys()
        for n, q in found.codes.items():
            W_hat = q.dequantize()
            assert W_hat.device == ELSEWHERE and torch.equal(W_hat.held, expected.codes[n].dequantize()), n
            assert all(t.device == ELSEWHERE for t in method.formats()[0].pack(q).values() if t.numel() > 256 and t.ndim > 1)


def test_packing_and_nf4_go_along():
    W = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    with Elsewhere():
        q = quantize_nf4(There(W))
        assert dequantize_nf4(q).device == ELSEWHERE
        codes = There(torch.randint(0, 8, (32, 64), dtype=torch.int32))
        assert torch.equal(packing.unpack_gptq(packing.pack_gptq(codes, 3), 3).held, codes.held)
        four = There(codes.held % 16)
        assert torch.equal(packing.unpack_awq(packing.pack_awq(four)).held, four.held)


def test_a_forgotten_device_is_found(tiny, monkeypatch):
    """The test above can fail: a Gram matrix made on the CPU does not go unnoticed."""
    monkeypatch.setattr(Gram, "of", classmethod(lambda cls, width, device: cls(torch.zeros(width, width), torch.zeros(width))))
    with Elsewhere(), pytest.raises(RuntimeError, match="of the CPU meets one elsewhere"):
        quantize_model(there(tiny), Gptq(group_size=64), [tuple(range(5, 37))] * 2)
    assert Keep().stays
