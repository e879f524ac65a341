"""Full fine-tuning: everything trains, or the top layers."""

from tests.methods.facts import Count, Default, Facts, Trains

FACTS = Facts(
    "full",
    Default("last_layers", None, "arXiv:1810.04805, section 3.2: all parameters are fine-tuned"),
    Trains(("*",), "arXiv:1810.04805, section 3.2: all parameters are fine-tuned"),
    Trains(("bert.encoder.layer.1.*",), "chosen here: the layers next to the output", {"last_layers": 1}),
    Count("roberta-base", 124_055_040, "all parameters below the head"),
    Count("roberta-base", 2 * 7_087_872, "two layers of 4 (d^2 + d) + 2 d f + f + d + 4 d", {"last_layers": 2}),
    Count("t5-base", 222_903_552, "all parameters"),
    Count("llama-7b", 6_738_415_616, "all parameters"),
)


@FACTS.tests
def test_published_facts(fact):
    fact()
