"""Ladder side-tuning as the paper writes it, with the layers' own functions handed in."""

import torch


def ladder(embeddings, outputs, first, downs, alphas, blocks, temperature=0.1):
    """Sung et al. 2022: s_0 = first(embeddings); s_i = block_i(g_i s_{i-1} + (1 - g_i) down_i(h_i))."""
    state = first(embeddings)
    for hidden, down, alpha, block in zip(outputs, downs, alphas, blocks):
        gate = 1 / (1 + torch.exp(-alpha / temperature))
        state = block(gate * state + (1 - gate) * down(hidden))
    return state


def kept(scores, count):
    """Indices of the ``count`` largest scores, in order."""
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
    return sorted(best)


def prune_attention(q, k, v, o, columns, heads, r):
    """Rows of one attention block that stay, from importances q, k, v, o (lists of rows), and rows of its output.

    In each head the rows whose products q * k * v, summed over the kept columns, are largest; then the output rows by
    their sum over the kept rows.
    """
    size = len(q) // heads
    rows = []
    for head in range(heads):
        part = range(head * size, (head + 1) * size)
        scores = [sum(q[i][c] * k[i][c] * v[i][c] for c in columns) for i in part]
        rows += [head * size + i for i in kept(scores, size // r)]
    output = kept([sum(row[i] for i in rows) for row in o], len(o) // r)
    return rows, output


def prune_ffn(up, down, columns, r):
    """Rows of the first map that stay, and rows of the second."""
    rows = kept([sum(row[c] for c in columns) for row in up], len(up) // r)
    return rows, kept([sum(row[i] for i in rows) for row in down], len(down) // r)
