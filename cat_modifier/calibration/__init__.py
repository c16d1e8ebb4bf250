# SPDX-License-Identifier: Apache-2.0
"""What is learned from calibration data: groups of Linears and their second moments."""
