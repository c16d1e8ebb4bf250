# SPDX-License-Identifier: Apache-2.0
"""vLLM: the plugin that serves CAT checkpoints."""
