# SPDX-License-Identifier: Apache-2.0
"""The online transform, fused with quantization, on CPUs and GPUs."""
