# SPDX-License-Identifier: Apache-2.0
"""What a CAT checkpoint holds: its config, its transform tensors, and how it is written."""
