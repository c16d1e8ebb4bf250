# SPDX-License-Identifier: Apache-2.0
"""Training of transforms, layer by layer: how they start is the closed form"""
