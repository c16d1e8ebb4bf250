# SPDX-License-Identifier: Apache-2.0
"""llm-compressor: the modifiers of recipes."""
