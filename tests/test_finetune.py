"""Adapters on a frozen base: nothing else learns, nothing changes at first, and the bytes that it takes."""

import numpy as np
import pytest
import torch

from helpers.measure.bytes import predicted_bytes
from helpers.measure.finetune import LoRA, finetuning_bytes, fits_gpus, train, with_adapters
from helpers.measure.shapes import SHAPES
from helpers.methods.nf4 import Nf4
from helpers.models.layers import linears
from helpers.models.quantize import quantized

WINDOWS = torch.randint(0, 1280, (12, 32), generator=torch.Generator().manual_seed(0)).tolist()


def test_bytes_by_hand(tiny):
    """2 blocks of width 128 and 192: adapters of rank 4 on q, k, v, o, gate, up, down."""
    numbers = 4 * sum(
        m.in_features + m.out_features for _, m in linears(tiny))
    parts = finetuning_bytes(tiny.config, None, 4, 64)
    assert parts["weights"] == predicted_bytes(tiny.config, None) and parts["adapters"] == 2 * numbers
    assert parts["Adam's moments"] == 8 * numbers and parts["block inputs"] == 2 * 64 * 128 * 2
    whole = finetuning_bytes(tiny.config, None, None, 64)
    assert sum(whole[k] for k in ("weights", "gradients", "weights in fp32", "Adam's moments")) == 16 * tiny.num_parameters()
    with pytest.raises(ValueError, match="no gradient"):
        finetuning_bytes(tiny.config, Nf4(), None, 64)


def test_which_gpus_hold_70b():
    """As chapter 11 tells it: QLoRA fits one GPU of 80 GB, and two of 40; LoRA on 16 bits neither (two of 80: borderline)."""
    lora, qlora = (finetuning_bytes(SHAPES["70B"], base, 64, 2048) for base in (None, Nf4()))
    assert fits_gpus(qlora, 80) and fits_gpus(qlora, 40, 2) and not fits_gpus(lora, 80) and not fits_gpus(lora, 40, 2)
    assert 2.5 < sum(lora.values()) / sum(qlora.values()) < 3.5


def test_at_first_the_model_is_the_base_and_only_adapters_learn(tiny):
    wrapped, ids = with_adapters(tiny, 4), torch.tensor(WINDOWS[:2])
    assert torch.equal(wrapped(input_ids=ids).logits, tiny(input_ids=ids).logits)
    learn = {n for n, p in wrapped.named_parameters() if p.requires_grad}
    assert learn and all(n.endswith((".A", ".B")) for n in learn)
    assert sum(isinstance(m, LoRA) for m in wrapped.modules()) == len(list(linears(tiny)))
    before = {n: p.clone() for n, p in wrapped.named_parameters()}
    train(wrapped, WINDOWS, 2, 0)
    changed = {n for n, p in wrapped.named_parameters() if not torch.equal(p, before[n])}
    assert changed == learn


def test_gradients_are_those_of_the_merged_weight():
    """y = x (W + s B A)^T: dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW."""
    generator = torch.Generator().manual_seed(0)
    lora = LoRA(torch.nn.Linear(8, 6, bias=False), 2, 4.0, generator)
    lora.B.data = torch.randn(6, 2, generator=generator)
    x = torch.randn(5, 8, generator=generator)
    lora(x).square().sum().backward()
    merged = (lora.base.weight + 2.0 * lora.B @ lora.A).detach().requires_grad_()
    (x @ merged.T).square().sum().backward()
    torch.testing.assert_close(lora.B.grad, 2.0 * merged.grad @ lora.A.detach().T)
    torch.testing.assert_close(lora.A.grad, 2.0 * lora.B.detach().T @ merged.grad)


def test_learning_falls_and_repeats_by_seed(tiny):
    first, again, other = (train(with_adapters(quantized(tiny, Nf4(), ()), 4, seed=1), WINDOWS, 6, seed, WINDOWS[:4], every=3)
                           for seed in (0, 0, 1))
    assert np.array_equal(first.losses, again.losses) and not np.array_equal(first.losses, other.losses)
    assert first.at.tolist() == [0, 3, 6] and first.held_out.shape == (3, 4)
    assert first.held_out[-1].mean() < first.held_out[0].mean()
    with pytest.raises(ValueError, match="at least a batch"):
        train(with_adapters(tiny, 4), WINDOWS[:2], 1, 0)
