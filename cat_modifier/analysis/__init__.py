# SPDX-License-Identifier: Apache-2.0
"""What limits the accuracy of each quantized Linear, and what would help."""

from cat_modifier.analysis.compared_transforms import TRANSFORMS
from cat_modifier.analysis.comparison import compare
from cat_modifier.analysis.layers import analyze
from cat_modifier.analysis.schemes import Scheme

__all__ = ["TRANSFORMS", "Scheme", "analyze", "compare"]
