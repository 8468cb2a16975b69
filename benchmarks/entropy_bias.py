# SPDX-License-Identifier: Apache-2.0
"""What the estimates of the batch entropy leave out: the table of docs/entropy.md.

``python -m benchmarks.entropy_bias`` prints it in Markdown; ``--tokens`` and ``--bits`` change the size. Every row is
one draw of tokens; "hard" is the entropy of the codes that the tokens actually take, by counting.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from vidkernels import ops
from vidkernels.nn import CodebookUsage

ESTIMATES: dict[str, dict[str, object]] = {
    "exact": {"estimator": "exact"},
    "groups of 9": {"estimator": "groups", "group_size": 9},
    "groups of 3": {"estimator": "groups", "group_size": 3},
    "bits": {"estimator": "bits"},
}
INV_TEMPERATURES = (1.0, 10.0, 100.0)
SEED = 20240613


def inputs(tokens: int, bits: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, x [tokens, bits]) of kinds of data that a tokenizer meets."""
    torch.manual_seed(SEED)
    yield "independent channels", torch.randn(tokens, bits)
    factors = torch.randn(6, bits)
    yield "rank 6", F.normalize(torch.randn(tokens, 6) @ factors, dim=0) * math.sqrt(tokens)
    centers = torch.randn(64, bits)
    yield "64 clusters", centers[torch.randint(64, (tokens,))] + 0.1 * torch.randn(tokens, bits)


def hard_entropy(x: torch.Tensor) -> float:
    """Entropy of the codes that the tokens take."""
    usage = CodebookUsage(2 ** x.shape[-1])
    usage.update(ops.lfq_codes_to_indices(x))
    return usage.entropy


def gradient(x: torch.Tensor, inv_temperature: float, options: dict[str, object]) -> tuple[float, torch.Tensor]:
    """The estimate and its gradient."""
    leaf = x.clone().requires_grad_()
    value = ops.lfq_entropy(leaf, inv_temperature=inv_temperature, **options)[1]
    return value.item(), torch.autograd.grad(value, leaf)[0].flatten()


def table(tokens: int, bits: int) -> list[str]:
    """The table's lines."""
    head = ["tokens", "tau", *ESTIMATES, "hard"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, x in inputs(tokens, bits):
        for inv_temperature in INV_TEMPERATURES:
            values = {key: gradient(x, inv_temperature, options) for key, options in ESTIMATES.items()}
            exact = values["exact"][1]
            cells = [f"{values['exact'][0]:.3f}"]
            for key in list(ESTIMATES)[1:]:
                value, slope = values[key]
                cells.append(f"{value:.3f} ({F.cosine_similarity(slope, exact, dim=0).item():.2f})")
            lines.append(f"| {name} | {inv_temperature:g} | {' | '.join(cells)} | {hard_entropy(x):.3f} |")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--bits", type=int, default=18)
    arguments = parser.parse_args()
    ceiling = min(arguments.bits * math.log(2), math.log(arguments.tokens))
    print(
        f"{arguments.tokens} tokens, {arguments.bits} bits, full codebook {arguments.bits * math.log(2):.3f}, ", end=""
    )
    print(f"log of the tokens {math.log(arguments.tokens):.3f} (hard codes cannot exceed {ceiling:.3f})\n")
    print("\n".join(table(arguments.tokens, arguments.bits)))


if __name__ == "__main__":
    main()
