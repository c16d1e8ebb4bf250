# SPDX-License-Identifier: Apache-2.0
"""Kernels for CPUs and GPUs: the online transform, fused with quantization."""
