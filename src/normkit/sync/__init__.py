"""Statistics of all ranks of a process group.

groups       which ranks: every way to name a group
collective   the one collective there is: a sum over ranks, in float64
merging      Moments of all ranks
first_sums   a check that the first messages of a group are of one size
agreement    a check that all ranks are at the same layer
join         uneven numbers of batches
"""

from normkit.sync.agreement import check_ranks
from normkit.sync.collective import sum_over
from normkit.sync.groups import alone, is_group
from normkit.sync.join import join
from normkit.sync.merging import merge_all_over, merge_over

__all__ = [
    "alone",
    "check_ranks",
    "is_group",
    "join",
    "merge_all_over",
    "merge_over",
    "sum_over",
]
