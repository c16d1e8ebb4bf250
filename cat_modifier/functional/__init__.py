# SPDX-License-Identifier: Apache-2.0
"""The mathematics of CAT: pure functions on tensors, no models, no hooks, no files."""
