# SPDX-License-Identifier: Apache-2.0
"""Training of transforms layer by layer, and what it shares with distillation."""
