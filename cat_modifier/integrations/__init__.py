# SPDX-License-Identifier: Apache-2.0
"""The libraries that load and serve CAT checkpoints."""
