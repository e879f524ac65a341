"""What torchao's int8 and int4 weights do beside a method, as JSON; a program of its own, since importing torchao takes
seconds and the other tests are to run without it."""

import json

from torch import int4, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_

import peftlib
from peftlib.anatomy import weights
from peftlib.conformance.case import Case, backbone, logits, train
from peftlib.errors import PeftlibError
from tests.mechanisms.packing import plain
from tests.methods.helpers import perturb

METHODS = ("lora", "ia3", "oft", "dora", "krona", "bitfit", "sequential_adapter", "prefix_tuning")
CHANGING = ("full", "pissa", "qlora", "threshold_mask", "delta_lora", "fish_mask", "lora_prune")
FORMS = {"int8": Int8WeightOnlyConfig(), "int4": IntxWeightOnlyConfig(weight_dtype=int4)}


def quantized(form: str) -> nn.Module:
    model = backbone("bert")
    quantize_(model.bert, FORMS[form])
    return model


def look(method: str, form: str) -> dict[str, object]:
    case, model = Case(method, "bert"), quantized(form)
    twin, adapted = case.attach(plain(model)), case.attach(model)
    full = case.attach()
    for one in (twin, adapted):
        perturb(one)
    found = {"start": float((case.logits(model) - case.logits(twin.model)).abs().max())}
    found["counts"] = adapted.count() == full.count()
    before = [p.detach().clone() for p in adapted.trainable().values()]
    train(adapted, case.batch(), 1)
    found["trains"] = all(not p.equal(b) for p, b in zip(adapted.trainable().values(), before))
    want = case.logits(model)
    again = peftlib.load(quantized(form), peftlib.load(backbone("bert"), adapted.snapshot()).snapshot())
    found["file"] = float((case.logits(again.model) - want).abs().max())
    if method not in ("sequential_adapter", "prefix_tuning"):
        merged = again.merge()
        found["merged"] = float((logits(merged, **case.inputs()) - want).abs().max())
        found["packed"] = sum(weights.packed(m) is not None for m in merged.modules())
    return found


def refusal(method: str, form: str) -> str:
    try:
        Case(method, "bert").start(quantized(form))
    except PeftlibError as error:
        return f"{type(error).__name__}: {error}"
    return "attached"


if __name__ == "__main__":
    right = {f"{form} {method}": look(method, form) for form in FORMS for method in METHODS}
    refused = {f"{form} {method}": refusal(method, form) for form in FORMS for method in CHANGING}
    print(json.dumps({"right": right, "refused": refused}))
