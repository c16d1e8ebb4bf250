# SPDX-License-Identifier: Apache-2.0
"""Statistics of calibration data: Linears that share an input, and its second moments."""
