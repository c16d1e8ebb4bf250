# SPDX-License-Identifier: Apache-2.0
"""Kernels: the online transform, fused with quantization; the product of packed weights."""
