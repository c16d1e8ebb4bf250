# SPDX-License-Identifier: Apache-2.0
"""Training of all transforms together, by distillation of the unquantized model."""
