"""How a method's adapters stand in the files of Hugging Face peft: what a method says in ``hf_peft``.

:mod:`peftlib.interchange` reads and writes the files; here is what differs from method to method. A method whose
layers stand beside linear maps says it with :class:`Updates` in a few lines.
"""

from peftlib.methods.bases.hf_peft.format import (
    MAPS,
    Fill,
    Format,
    Settings,
    Tensors,
    all_used,
    by_module,
    copy,
    module_names,
    patterns,
    sites_of,
    task_of,
)
from peftlib.methods.bases.hf_peft.prompts import EVERY_PROMPT, Prefix, Prompt
from peftlib.methods.bases.hf_peft.updates import LORA_REFUSED, LORA_UNUSED, LowRank, Updates, Values

__all__ = [
    "EVERY_PROMPT",
    "LORA_REFUSED",
    "LORA_UNUSED",
    "MAPS",
    "Fill",
    "Format",
    "LowRank",
    "Prefix",
    "Prompt",
    "Settings",
    "Tensors",
    "Updates",
    "Values",
    "all_used",
    "by_module",
    "copy",
    "module_names",
    "patterns",
    "sites_of",
    "task_of",
]
