"""Memory and time: measured (:mod:`peftlib.efficiency.measure`), and planned from shapes."""
