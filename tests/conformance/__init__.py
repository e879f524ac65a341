"""One suite for every method: the table of checks is ``checks.py``, the world they run in ``case.py``."""
