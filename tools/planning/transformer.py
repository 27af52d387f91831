"""The layers of Megatron-LM's GPT (2021) by hand: which kernels ran, before attention was one of them.

Its fused kernels (bias + GeLU, scale + mask + softmax, bias + dropout + add) and those that were not, for one sample of
``seq`` tokens in 16 bits; forward FLOPs of products add up to 24 s h^2 (1 + s / 6h) a layer.
"""

from __future__ import annotations

from daggc.plan.parallel import Kernel, Layer, Layers, Product

_BYTES = 2


def gpt(layers: int, hidden: int, heads: int, seq: int = 2048, vocabulary: int = 51200) -> Layers:
    """A GPT with tied embeddings."""
    inner = [_block(str(number), hidden, heads, seq) for number in range(layers)]
    table, values = vocabulary * hidden, seq * hidden
    before = Layer(
        "embedding",
        (_moves(6 * values), _moves(5 * values)),  # rows and positions, dropout
        (_moves(5 * values), _moves(0, 3 * table, True)),
        (float(table), float(seq * hidden)),
        (0.0, 1.0 * values),
        _BYTES * values,
        (_BYTES * values, 0.0),
    )
    logits = seq * vocabulary
    forward, backward = _linear(seq, vocabulary, hidden, "columns")
    after = Layer(
        "head",
        # cross entropy in f32: to f32, largest, subtract, exponential, sum, divide
        (_moves(4 * values), *forward, *(_moves(each * logits, cut=True) for each in (6, 4, 8, 8, 4, 8))),
        (_moves(12 * logits, cut=True), *backward, _moves(8 * values)),
        (0.0, 2.0 * hidden),
        (6.0 * logits, 2.0 * _BYTES * values),
        0.0,
        (0.0, _BYTES * values),
    )
    return Layers((before, *inner, after), _BYTES, float(table))


def _block(name: str, hidden: int, heads: int, seq: int) -> Layer:
    values, scores, width = seq * hidden, heads * seq * seq, hidden // heads
    products = {
        "qkv": _linear(seq, 3 * hidden, hidden, "columns"),
        "proj": _linear(seq, hidden, hidden, "rows"),
        "up": _linear(seq, 4 * hidden, hidden, "columns"),
        "down": _linear(seq, hidden, 4 * hidden, "rows"),
    }
    score = _batched(heads, seq, seq, width)
    mix = _batched(heads, seq, width, seq)
    forward = (
        _moves(4 * values),  # layer norm
        *products["qkv"][0],
        score,
        _moves(4 * scores, cut=True),  # scale, mask, softmax
        _moves(5 * scores, cut=True),  # dropout
        mix,
        _moves(4 * values, cut=True),  # heads next to each other
        *products["proj"][0],
        _moves(7 * values),  # bias, dropout, add
        _moves(4 * values),  # layer norm
        *products["up"][0],
        _moves(16 * values, cut=True),  # bias, GeLU
        *products["down"][0],
        _moves(7 * values),  # bias, dropout, add
    )
    backward = (
        _moves(5 * values),
        *products["down"][1],
        _moves(24 * values, cut=True),
        *products["up"][1],
        _moves(8 * values),
        _moves(6 * values),  # gradients of the two ways
        _moves(5 * values),
        *products["proj"][1],
        _moves(4 * values, cut=True),
        _batched(heads, seq, seq, width),
        _batched(heads, seq, width, seq),
        _moves(5 * scores, cut=True),
        _moves(6 * scores, cut=True),
        _batched(heads, seq, width, seq),
        _batched(heads, seq, width, seq),
        _moves(12 * values, cut=True),  # q, k and v next to each other
        *products["qkv"][1],
        _moves(8 * values),
        _moves(6 * values),
    )
    cut, whole = 12.0 * hidden**2 + 7 * hidden, 6.0 * hidden
    kept = (24.0 * values + 5 * scores, 10.0 * values)  # Korthikanti et al. 2022, equation 2
    reduced = 2.0 * _BYTES * values
    return Layer(name, forward, backward, (cut, whole), kept, _BYTES * values, (reduced, reduced))


def _moves(nbytes: float, fixed: float = 0.0, cut: bool = False) -> Kernel:
    return Kernel("elementwise", 0.0, float(nbytes), float(fixed), cut)


def _linear(rows: int, n: int, k: int, how: str) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """A product with a weight [n, k]; in the backward, its gradient is added to that of other microbatches."""
    flops, moved, weight = 2.0 * rows * n * k, _BYTES * float(rows * (n + k)), _BYTES * float(n * k)
    by_columns = how == "columns"
    forward = Product(1, rows, n, k, "m", "n" if by_columns else "k")
    inputs = Product(1, rows, k, n, "m", "k" if by_columns else "n")
    weights = Product(1, n, k, rows, "k", "m" if by_columns else "n")
    products = [Kernel("gemm", flops, moved, weight, True, product) for product in (forward, inputs, weights)]
    bias = _moves(_BYTES * rows * n, cut=by_columns)
    return (products[0],), (products[1], products[2], bias, _moves(0, 3 * weight, True))


def _batched(heads: int, m: int, n: int, k: int) -> Kernel:
    moved = _BYTES * float(heads * (m * n + m * k + n * k))
    return Kernel("gemm", 2.0 * heads * m * n * k, moved, 0.0, True, Product(heads, m, n, k, "count", "count"))
