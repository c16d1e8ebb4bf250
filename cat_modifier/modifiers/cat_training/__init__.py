# SPDX-License-Identifier: Apache-2.0
"""Training of transforms, layer by layer, from the closed form on."""
