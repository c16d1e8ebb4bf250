# SPDX-License-Identifier: Apache-2.0
"""Transformers: ``from_pretrained`` of CAT checkpoints."""
