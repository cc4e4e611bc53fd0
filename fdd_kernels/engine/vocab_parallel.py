"""Vocabulary-parallel heads: each process of a group holds some rows of both LM heads.

All processes see the same tokens. A process computes the statistics of its own part of the
vocabulary. These are all-gathered, 2 L + 3 requests + 9 moments numbers per row and process, and
merged by every process (`shards.py`), so that the outputs are the same everywhere. With the merged
statistics in place of its own, `lens_grad` gives a process its rows of the head's gradient and its
share of the hidden states' gradients, which are all-reduced. Divergences other than KL and reverse
KL have no chain rule. They are summed in a second pass, once the log-sum-exps of the whole
vocabulary are known.

On the cached-logits path all of this happens for one row block after another. The blocks must be
the same on all processes; `agreement.py` finds their size before any work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fdd_kernels.backends import torch_stream
from fdd_kernels.engine import ops
from fdd_kernels.engine.shards import (
    first_pass,
    merge_statistics,
    part_statistics,
    second_pass_requests,
)
from fdd_kernels.lens.inputs import LensInputs
from fdd_kernels.lens.layout import GRAD_SUM, VALUE, Statistics
from fdd_kernels.lens.spec import LensSpec


@dataclass(frozen=True)
class VocabShard:
    """A process's part of the vocabulary.

    Attributes:
        group: the processes that hold the other parts.
        rank: this process's rank r among them.
        bounds: rank r holds tokens bounds[r] to bounds[r + 1]; bounds[-1] tokens are compared.
        vocabulary: rows of the student's whole head.
    """

    group: dist.ProcessGroup
    rank: int
    bounds: tuple[int, ...]
    vocabulary: int

    @property
    def columns(self) -> int:
        """How many tokens this process compares."""
        return self.bounds[self.rank + 1] - self.bounds[self.rank]

    def own_labels(self, labels: Tensor) -> Tensor:
        """Count labels (R,) from this process's first token; -1 where another rank owns one."""
        first, last = self.bounds[self.rank], self.bounds[self.rank + 1]
        return torch.where((labels >= first) & (labels < last), labels - first, -1)

    def statistics(self, inputs: LensInputs, spec: LensSpec, backend: str) -> Statistics:
        """Compute the statistics of the whole vocabulary, the same on every process.

        `inputs` and `spec` are this process's.
        """
        own = ops.lens_stats(*inputs, *first_pass(spec).encode(), backend)
        return self.merged(inputs, spec, Statistics(*own))

    def merged(self, inputs: LensInputs, spec: LensSpec, own: Statistics) -> Statistics:
        """Merge this process's own statistics with the others'."""
        own = part_statistics(inputs, spec, own)
        packed = torch.cat([t.flatten(0, 1) for t in own])
        parts = packed.new_empty((self.group.size(), *packed.shape))
        if packed.numel():
            dist.all_gather(list(parts.unbind()), packed, group=self.group)
        split = parts.split([len(t.flatten(0, 1)) for t in own], dim=1)
        merged = merge_statistics(spec, *[p.unflatten(1, t.shape[:2]) for p, t in zip(split, own)])
        if later := second_pass_requests(spec):
            sums = second_pass_sums(inputs, spec, merged.shifts, merged.requests)
            if sums.numel():
                dist.all_reduce(sums, group=self.group)
            merged.requests[later, VALUE], merged.requests[later, GRAD_SUM] = sums.unbind(1)
        if inputs.valid is not None:
            merged = Statistics(*[torch.where(inputs.valid, t, 0.0) for t in merged])
        return merged

    def sum_gradients(self, gradients: list[Tensor], count: int) -> list[Tensor]:
        """All-reduce the first `count` gradients, the hidden states', in place.

        Sums are float32 at least.
        """
        for gradient in gradients[:count]:
            if gradient.numel():
                wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                dist.all_reduce(wide, group=self.group)
                if wide is not gradient:
                    gradient.copy_(wide)
        return gradients


def second_pass_sums(
    inputs: LensInputs, spec: LensSpec, shifts: Tensor, requests: Tensor
) -> Tensor:
    """Compute VALUE and GRAD_SUM of the second pass's requests over this process's tokens.

    Plain PyTorch, tile by tile, whatever the backend is: no kernel takes log-sum-exps that are not
    of its own tokens. Returns (requests of the second pass, 2, R).
    """
    requests = requests.clone()
    with torch.autocast(inputs.device.type, enabled=False):
        torch_stream.add_second_pass(inputs, spec, shifts, requests)
    return requests[second_pass_requests(spec)][:, [VALUE, GRAD_SUM]]
