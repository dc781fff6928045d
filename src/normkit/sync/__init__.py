"""Statistics of all ranks of a process group.

groups       which ranks: every way to name a group
collective   the one collective there is: a sum over ranks, in float64
merging      Moments of all ranks
agreement    a check that all ranks are at the same layer
join         uneven numbers of batches
"""

from normkit.sync.agreement import agree, check_ranks, is_checking
from normkit.sync.collective import all_reduce_, sum_over
from normkit.sync.groups import (
    Group,
    Ranks,
    alone,
    is_group,
    is_running,
    process_group_of,
)
from normkit.sync.join import empty_of, join
from normkit.sync.merging import merge_all_over, merge_over

__all__ = [
    "Group",
    "Ranks",
    "agree",
    "all_reduce_",
    "alone",
    "check_ranks",
    "empty_of",
    "is_checking",
    "is_group",
    "is_running",
    "join",
    "merge_all_over",
    "merge_over",
    "process_group_of",
    "sum_over",
]
