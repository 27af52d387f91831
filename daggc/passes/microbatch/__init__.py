"""Cutting a batch into microbatches exactly: which losses add up, and how they must be rewritten for it.

The analysis follows the batch axis through the forward (:mod:`.follow`). If the loss is a sum over samples,
or a mean over them, or a sum divided by a count that the data alone determines, the forward is rewritten so that
the losses of all microbatches add up to the loss of the whole batch; the gradients then add up too, since
differentiation is linear. If an op mixes samples (batch norm in training), it is named.
"""

from daggc.passes.microbatch.resize import at_batch
from daggc.passes.microbatch.rewrite import Microbatched, microbatched, require_alike, rewrite_like
from daggc.passes.microbatch.state import Edit, Mixing

__all__ = ["Edit", "Microbatched", "Mixing", "at_batch", "microbatched", "require_alike", "rewrite_like"]
