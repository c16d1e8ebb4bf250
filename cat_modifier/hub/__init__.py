# SPDX-License-Identifier: Apache-2.0
"""The model card of a checkpoint, and its way to the Hugging Face Hub."""
