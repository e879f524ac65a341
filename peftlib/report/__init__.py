"""What readers see: executed notebooks, generated pages, figures and tables, the book."""

from peftlib.report.costs import cost_figure, memory_rows, step_rows, variant_rows
from peftlib.report.counts import count
from peftlib.report.figures import (
    learning_rate_search,
    loss_curves,
    quality_against_parameters,
    sites_diagram,
    taxonomy_tree,
)
from peftlib.report.learned import (
    calibration_error,
    quantization_error_figure,
    quantization_errors,
    reliability,
    reliability_diagram,
)
from peftlib.report.searches import pareto_rows, search_figure, search_rows, structure_means, structure_rows
from peftlib.report.selection import budget, budget_by_layer, budget_map, masks, overlap, overlap_map
from peftlib.report.show import comparison, source, table
from peftlib.report.standings import Standings
from peftlib.report.updates import (
    mixture_figure,
    mixture_weights,
    rank_figure,
    ranks_over_time,
    score_by_rank_figure,
    scores_by_rank,
    singular_value_figure,
    singular_values,
)

__all__ = [
    "Standings",
    "budget",
    "budget_by_layer",
    "budget_map",
    "calibration_error",
    "comparison",
    "cost_figure",
    "count",
    "learning_rate_search",
    "loss_curves",
    "masks",
    "memory_rows",
    "mixture_figure",
    "mixture_weights",
    "overlap",
    "overlap_map",
    "pareto_rows",
    "quality_against_parameters",
    "quantization_error_figure",
    "quantization_errors",
    "rank_figure",
    "ranks_over_time",
    "reliability",
    "reliability_diagram",
    "score_by_rank_figure",
    "scores_by_rank",
    "search_figure",
    "search_rows",
    "singular_value_figure",
    "singular_values",
    "sites_diagram",
    "source",
    "step_rows",
    "structure_means",
    "structure_rows",
    "table",
    "taxonomy_tree",
    "variant_rows",
]
