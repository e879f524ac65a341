"""What a backbone learns from unlabelled text: masked tokens, spans as T5 has them, states."""

import pytest
import torch

from peftlib import backbones
from peftlib.errors import UnknownNameError, UnsupportedError
from peftlib.training import objectives
from tests.methods.helpers import backbone


def test_the_masked_tokens_are_as_many_and_become_what_bert_has():
    loaded = backbones.load("tiny-bert", head="masked_lm")
    tokenizer = loaded.tokenizer
    film = tokenizer.convert_tokens_to_ids("film")
    rows = [[tokenizer.cls_token_id, *[film] * 199], [tokenizer.cls_token_id, *[film] * 99]] * 100
    torch.manual_seed(0)
    batch = objectives.Masked(loaded.model, tokenizer).collate([{"input_ids": row} for row in rows])
    masked, labels = batch["input_ids"], batch["labels"]
    ids = torch.where(labels != -100, labels, masked)
    assert ids.tolist() == [row + [tokenizer.pad_token_id] * (200 - len(row)) for row in rows]
    assert batch["attention_mask"].sum(1).tolist() == [len(row) for row in rows]
    chosen = labels != -100
    words = ids == film
    assert not chosen[~words].any()
    assert float(chosen[words].float().mean()) == pytest.approx(0.15, abs=0.01)
    assert float((masked[chosen] == tokenizer.mask_token_id).float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float((masked[chosen] == ids[chosen]).float().mean()) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 40, 200])
def test_spans_and_what_is_left_are_the_text(n):
    torch.manual_seed(n)
    text, sentinels = list(range(n)), list(range(1000, 1100))
    source, target = objectives.corrupt(text, sentinels)
    spans, restored = {}, []
    for token in target:
        if token >= 1000:
            spans[token] = []
        else:
            spans[next(reversed(spans))].append(token)
    for token in source:
        restored += spans.get(token, []) if token >= 1000 else [token]
    assert restored == text
    assert target[-1] >= 1000 and not spans[target[-1]]
    if n > 3:
        assert sum(token < 1000 for token in target) == max(1, round(0.15 * n))
        assert len(spans) - 1 == max(1, round(round(0.15 * n) / 3))
        assert source[0] == 0  # a text begins with what is left


def test_states_that_are_the_backbones_own_have_no_loss_and_padding_does_not_count():
    model = backbone("bert", "base")
    goal = objectives.States(model, backbones.load("tiny-bert").tokenizer)
    rows = [[2, 7, 8, 3], [2, 9, 3]]
    assert float(goal.loss(rows)) == pytest.approx(0, abs=1e-10)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias.add_(0.1)
        whole = goal.loss(rows)
        by_hand, first, scale = [], 0.0, 0.0
        states = []
        for row in rows:
            ids = torch.tensor([row])
            pair = [m(ids, output_hidden_states=True).hidden_states[1:] for m in (model, goal.teacher)]
            states.append([(mine[0], theirs[0]) for mine, theirs in zip(*pair)])
        for layer in range(len(states[0])):
            mine, theirs = (torch.cat([row[layer][i] for row in states]) for i in (0, 1))
            by_hand.append((mine - theirs).square().sum() / (theirs - theirs.mean(0)).square().sum())
            mine, theirs = (torch.stack([row[layer][i][0] for row in states]) for i in (0, 1))
            first += (mine - theirs).square().sum()
            scale += (theirs - theirs.mean(0)).square().sum()
        expected = (torch.stack(by_hand).mean() + first / scale) / 2
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_is_named():
    with pytest.raises(UnknownNameError, match="objective 'spam'"):
        objectives.find("spam")
    loaded = backbones.load("tiny-t5", head="base")
    with pytest.raises(UnsupportedError, match="has a decoder too"):
        objectives.States(loaded.model, loaded.tokenizer)
