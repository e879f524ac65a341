"""What readers see: executed notebooks, generated pages, figures and tables, the book."""

from peftlib.report.figures import learning_rate_search, loss_curves, quality_against_parameters, sites_diagram
from peftlib.report.show import comparison, source, table

__all__ = [
    "comparison",
    "learning_rate_search",
    "loss_curves",
    "quality_against_parameters",
    "sites_diagram",
    "source",
    "table",
]
