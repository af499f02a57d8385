"""How often torch's f32 results on this CPU have the bits of the orders that NUMERICS.md states for `--compute f32`.

    python3 golden/torch_orders.py

Prints, for a linear, a sum of squares and a softmax, the share of equal results. The orders are written out here in
numpy; torch is the judge. What it finds holds for one build of torch on one CPU: it prints both.
"""

import numpy as np
import torch

ROWS = 64


def linear_order(x, w):
    """An ascending chain of fused multiply-adds for each block of k, block sums added in order."""
    k = x.shape[1]
    block = -(-k // 2) if 192 < k <= 384 else min(192, k)
    x, w, total = x.astype(np.float64), w.astype(np.float64), None
    for start in range(0, k, block):
        chain = np.zeros((len(x), len(w)), np.float32)
        for i in range(start, min(k, start + block)):
            chain = (x[:, i : i + 1] * w[:, i] + chain).astype(np.float32)
        total = chain if total is None else total + chain
    return total


def square_order(x, lanes=8, chains=4, step=16):
    """Sum of squares by levels over four chains of eight lanes."""
    squares = x * x
    whole = x.shape[1] // (lanes * chains)
    sums = []
    for chain in range(chains):
        levels = [np.zeros((len(x), lanes), np.float32) for _ in range(4)]
        for row in range(whole):
            at = (row * chains + chain) * lanes
            levels[0] = levels[0] + squares[:, at : at + lanes]
            span = step
            for level in range(1, 4):
                if (row + 1) % span:
                    break
                levels[level] = levels[level] + levels[level - 1]
                levels[level - 1] = np.zeros_like(levels[0])
                span *= step
        sums.append(levels[0] + levels[1] + levels[2] + levels[3])
    tail = squares[:, whole * lanes * chains :]
    lines = tail.shape[1] // lanes
    for line in range(lines):
        sums[0] = sums[0] + tail[:, line * lanes : (line + 1) * lanes]
    first = sums[0] + sums[1] + sums[2] + sums[3]
    total = np.zeros(len(x), np.float32)
    for i in range(lines * lanes, tail.shape[1]):
        total = total + tail[:, i]
    for lane in range(lanes):
        total = total + first[:, lane]
    return total


def softmax_order(x, lanes=16):
    """Exponentials rounded once, sixteen chains by position, folded in halves, a product with the reciprocal."""
    powers = np.exp((x - x.max(-1, keepdims=True)).astype(np.float64)).astype(np.float32)
    chains = np.zeros((len(x), lanes), np.float32)
    for start in range(0, x.shape[1], lanes):
        chains = chains + powers[:, start : start + lanes]
    while chains.shape[1] > 1:
        half = chains.shape[1] // 2
        chains = chains[:, :half] + chains[:, half:]
    return powers * (np.float32(1) / chains)


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}")
    for k in (32, 128, 192, 193, 200, 256, 320, 384, 385, 448, 768, 2048):
        x, w = torch.randn(2048, k), torch.randn(128, k)
        theirs = torch.nn.functional.linear(x, w).numpy()[:ROWS]
        equal = (linear_order(x.numpy()[:ROWS], w.numpy()) == theirs).mean()
        print(f"linear       k {k:5}: {equal:.4f} equal")
    for width in (32, 50, 128, 200, 256, 2048, 12288):
        x = torch.randn(500, width)
        equal = (square_order(x.numpy()) / np.float32(width) == x.pow(2).mean(-1).numpy()).mean()
        print(f"mean square  n {width:5}: {equal:.4f} equal")
    for width in (64, 2048):
        x = torch.randn(ROWS, width) * 3
        equal = (softmax_order(x.numpy()) == torch.softmax(x, -1).numpy()).mean()
        print(f"softmax      n {width:5}: {equal:.4f} equal")


if __name__ == "__main__":
    main()
