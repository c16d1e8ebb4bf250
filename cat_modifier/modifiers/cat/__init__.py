# SPDX-License-Identifier: Apache-2.0
"""llm-compressor: the modifier that makes CAT checkpoints."""
