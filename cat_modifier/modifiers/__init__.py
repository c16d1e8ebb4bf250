# SPDX-License-Identifier: Apache-2.0
"""Modifiers for recipes of llm-compressor."""
