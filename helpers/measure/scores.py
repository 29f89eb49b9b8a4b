"""Cheap scores of a quantized weight, from one pass of calibration text and one of its gradients: what allocators go by.

Each is a sum over the weights or outputs of one linear, on the unquantized model; dW = W - W_hat, X [tokens, in] its inputs,
G = dL/dY [tokens, out] the gradients of the text's loss in its outputs Y = X W^T.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from helpers.models.layers import hooked

BY_WEIGHTS = {  # no gradient is needed
    "weight error": lambda dW, X: dW.square().sum(),
    # llama.cpp's imatrix weighs each column by the mean square of its inputs
    "error x input energy": lambda dW, X: (X.square().sum(0) * dW.square()).sum(),
    # ||dW X||^2, what GPTQ minimises (Frantar et al. 2022, eq. 1)
    "output error": lambda dW, X: (X @ dW.T).square().sum(),
}
BY_GRADIENTS = {
    # AutoRound's AutoScheme ("DeltaLoss"): the first-order change of the loss, each weight's by its magnitude
    "gradient x error": lambda dW, X, G: ((G.T @ X) * dW).abs().sum(),
    # the empirical Fisher diagonal, token by token (SqueezeLLM, Kim et al. 2023, arXiv 2306.07629)
    "Fisher x error": lambda dW, X, G: ((G.square().T @ X.square()) * dW.square()).sum(),
    # ModelOpt's auto_quantize, method="gradient": squared gradient times squared change of the output
    "gradient x output error": lambda dW, X, G: (G.square() * (X @ dW.T).square()).sum(),
}


def passes(model: nn.Module, names: Sequence[str], sequences: Sequence[Sequence[int]], gradients: bool
           ) -> Iterator[dict[str, tuple[Tensor, ...]]]:
    """{linear: (X,) or (X, G)} of each sequence, one after another."""
    modules = {n: model.get_submodule(n) for n in names}
    for sequence in sequences:
        seen: dict[str, list[Tensor]] = {}

        def see(n: str, args, out, seen=seen) -> None:
            seen[n] = [args[0].detach().flatten(0, -2).float()]
            if gradients:
                out.register_hook(lambda g: seen[n].append(g.flatten(0, -2).float()))

        ids = torch.tensor([list(sequence)], device=model.device)
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_(gradients)  # the weights need no gradient
        with hooked([(m, partial(see, n)) for n, m in modules.items()], after=True), torch.set_grad_enabled(gradients):
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1].float()
            if gradients:
                nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
        yield {n: tuple(tensors) for n, tensors in seen.items()}


def cheap_scores(model: nn.Module, quantized: Mapping[tuple[str, Hashable], Tensor], sequences: Sequence[Sequence[int]],
                 gradients: bool = True) -> dict[str, dict[tuple[str, Hashable], float]]:
    """{score: {(linear, setting): its value}} of {(linear, setting): W_hat [out, in]}, summed over the sequences, each a batch
    of its own. The model's parameters get no gradients. Raises ValueError without a sequence of at least two tokens.
    """
    if not any(len(s) > 1 for s in sequences):
        raise ValueError("sequences: expected at least one of two tokens or more")
    errors = {key: (model.get_submodule(key[0]).weight.detach() - W_hat.to(model.device)).float()
              for key, W_hat in quantized.items()}
    wanted = BY_WEIGHTS | (BY_GRADIENTS if gradients else {})
    found = {score: dict.fromkeys(errors, 0.0) for score in wanted}
    frozen = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(False)
        names = list(dict.fromkeys(n for n, _ in errors))
        for seen in passes(model, names, [s for s in sequences if len(s) > 1], gradients):
            for (n, setting), dW in errors.items():
                for score, of in wanted.items():
                    found[score][n, setting] += of(dW, *seen[n][:2 if score in BY_GRADIENTS else 1]).item()
    finally:
        for p in frozen:
            p.requires_grad_(True)
    return found
