"""How far a field is off, judged from the aligned pair as a whole: one number, in pixels.

The map of expected errors is a sum of local opinions, made before the last step had moved anything. This small head
looks again once all is aligned: how well the descriptors of both images fit in a window around each point, at three
strides; whether the window would rather have them elsewhere; the map of expected errors and the shape of the field. It
is trained when the alignment is finished, on results that went wrong in many ways (``failures``), and changes nothing
of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from bsafusion.models.layers import conv_norm_act, resize

RADIUS = 3
"""Of the windows in which descriptors are compared, in voxels of their grid."""

WORST = 12.0
"""Pixels of the working grid: mean errors are told apart up to here. As much is meant to be said of images that do not
belong together."""


class Assessment(nn.Module):
    """Windows of correlations after alignment, expected errors and field -> mean error inside the head.

    Args:
        strides: of the grids on which the aligned images are compared.
        width: channels.
    """

    trained: Tensor

    def __init__(self, strides: Sequence[int], width: int) -> None:
        super().__init__()
        self.strides = sorted(strides)
        self.windows = nn.ModuleDict({str(s): nn.Conv2d((2 * RADIUS + 1) ** 2, width, 1) for s in self.strides})
        self.state = nn.Conv2d(3, width, 1)
        self.body = conv_norm_act(width, width)
        self.coarser = nn.ModuleList(conv_norm_act(width, width, stride=b // a) for a, b in pairwise(self.strides))
        self.mix = nn.ModuleList(conv_norm_act(width, width) for _ in self.strides)
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Linear(2 * width, 1)
        # Kept with the weights; until it is set the head's answer is not reported.
        self.register_buffer("trained", torch.zeros((), dtype=torch.uint8))

    def forward(self, correlations: Mapping[int, Tensor], expected_error: Tensor, displacement: Tensor) -> Tensor:
        """Judge aligned pairs.

        Args:
            correlations: ``B (2r+1)^2 h w`` for each stride: descriptors of the fixed image with those of the aligned.
            expected_error: ``B 1 H W``, pixels.
            displacement: ``B 2 H W``, pixels.

        Returns:
            ``B``, pixels; in evaluation mode at most :data:`WORST`.
        """
        first = correlations[self.strides[0]]
        shape = (first.shape[-2], first.shape[-1])
        expected, field = resize(expected_error, shape), resize(displacement, shape)
        shape_of_field = (field - field.mean((2, 3), keepdim=True)) / 8
        x = self.state(torch.cat([expected.clamp(min=0.05).log(), shape_of_field], 1).to(first))
        x = self.body(x + self.windows[str(self.strides[0])](first))
        x = self.mix[0](x)
        for index, stride in enumerate(self.strides[1:]):
            x = self.coarser[index](x) + self.windows[str(stride)](correlations[stride])
            x = self.mix[index + 1](x)
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        log_error: Tensor = self.out(self.dropout(pooled)).float().flatten()
        return log_error.exp() if self.training else log_error.exp().clamp(max=WORST)
