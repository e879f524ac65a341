"""Parameterized hypercomplex weights as their paper writes them: a sum of Kronecker products, formed entry by entry."""

import torch


def weight(A, s, t):
    """``sum_i A_i kron (s_i t_i^T)`` for A (n, n, n), s (n, out / n, rank), t (n, in / n, rank)."""
    n, p, q = len(A), s.shape[1], t.shape[1]
    W = torch.zeros(n * p, n * q, dtype=A.dtype)
    for i in range(n):
        B = [[sum(a * b for a, b in zip(row, column)) for column in t[i].tolist()] for row in s[i].tolist()]
        for row in range(n * p):
            for column in range(n * q):
                W[row, column] += A[i, row // p, column // q] * B[row % p][column % q]
    return W
