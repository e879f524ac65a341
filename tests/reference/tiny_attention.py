"""The tiny-attention adapter as its paper writes it: one position, one head at a time."""

import math

import torch


def tiny_attention(z, visible, maps, output, output_bias, head_dim):
    """What is added at each position of one sample's z (n, d). ``visible[t]`` are the positions that t attends to;
    ``maps`` are weight and bias of query, key and value, whose rows belong to one head after the other."""
    rows = [[w @ h + b for h in z] for w, b in maps]
    added = []
    for t in range(len(z)):
        total = output_bias.clone()
        for head in range(len(maps[0][1]) // head_dim):
            part = slice(head * head_dim, (head + 1) * head_dim)
            queries, keys, values = ([row[part] for row in one] for one in rows)
            scores = [math.exp(float(queries[t] @ keys[s]) / math.sqrt(head_dim)) for s in visible[t]]
            mixed = sum(score / sum(scores) * values[s] for score, s in zip(scores, visible[t]))
            total += output[:, part] @ mixed
        added.append(total)
    return torch.stack(added)
