"""Adapters in files of other libraries: into ours, ours into theirs, and what a folder holds.

- :mod:`peftlib.interchange.hf_peft`: Hugging Face peft, both ways;
- :mod:`peftlib.interchange.adapters`: AdapterHub's ``adapters``, read;
- :mod:`peftlib.interchange.inspection`: what any of these folders, or one of ours, holds.

None of these libraries is needed, and nothing that a folder holds is executed.
"""

from peftlib.interchange.adapters import from_adapters
from peftlib.interchange.hf_peft import from_hf_peft, to_hf_peft
from peftlib.interchange.inspection import Inspection, inspect

__all__ = ["Inspection", "from_adapters", "from_hf_peft", "inspect", "to_hf_peft"]
