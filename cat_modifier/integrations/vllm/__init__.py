# SPDX-License-Identifier: Apache-2.0
"""vLLM: the plugin which serves CAT checkpoints."""
