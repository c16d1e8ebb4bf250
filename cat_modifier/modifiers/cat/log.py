# SPDX-License-Identifier: Apache-2.0
"""Log lines about planned transforms."""

from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from loguru import logger

from cat_modifier.calibration.shared_inputs import SharedInput
from cat_modifier.functional.alignment import condition_number, correlation_rank
from cat_modifier.functional.sqnr import to_db
from cat_modifier.modifiers.cat.plan import Overhead, PlannedTransform
from cat_modifier.modifiers.cat.plan_options import OverheadUnit

__all__ = ["log_overhead", "log_transform", "warn_if_unaligned", "warn_of_unseen"]


def log_transform(one: PlannedTransform):
    """
    Log one line about a transform, and a warning if there were too few tokens.

    Does nothing for an input that no token reached.
    """
    if one.before is None or one.after is None:
        return
    source, layout = one.source, one.layout
    members = [name.rpartition(".")[2] for name in source.names]
    shown = "/".join(members[:4]) + ("/..." if len(members) > 4 else "")
    prefix = source.first.rpartition(".")[0]
    weights, activations = source.weight_args, source.activation_args
    # theorem 2.4 holds for integers
    is_float = weights is not None and weights.type == QuantizationType.FLOAT
    sqnr = (
        f"predicted W{_bits(weights)}A{_bits(activations)} SQNR"
        f"{' as integers' if is_float else ''} "
        f"{to_db(one.before.sqnr):.1f} -> {to_db(one.after.sqnr):.1f} dB"
    )
    logger.info(
        f"{prefix}.{shown}: {sqnr if source.is_quantized else 'not quantized'}, alignment "
        f"{to_db(one.before.alignment):.1f} -> {to_db(one.after.alignment):.1f} dB, "
        f"block size {layout.block_size}, Hadamard size {layout.hadamard_size}, "
        f"condition number {condition_number(one.transform.blocks):.1f}"
        + ("" if one.is_fused else f", T in {_dtype(one)}")
        + (f", range clipped to {one.clip_ratio:.2f}" if one.clip_ratio < 1 else "")
        + (f" ({layout.remark})" if layout.remark else "")
    )
    if source.token_count < layout.block_size:
        logger.warning(
            f"{source.first}: {source.token_count} calibration tokens are too few for blocks "
            f"of {layout.block_size} channels, which now depend on `dampening_frac`: use more "
            "or longer samples"
        )
        return
    if source.second_moments is None:
        return
    size = source.second_moments.shape[-1]
    rank = correlation_rank(source.second_moments)
    if rank < 0.75 * size:
        logger.warning(
            f"{source.first}: the calibration tokens are so alike that they determine {rank} "
            f"of the {size} channels of a block; the rest depends on "
            "`dampening_frac`: use more varied samples"
        )


def log_overhead(layer: str, overhead: Overhead, max_overhead: float, unit: OverheadUnit):
    """
    Log what the transforms of a decoding layer add online.

    :param layer: full name of the decoding layer
    """
    logger.info(
        f"{layer}: transforms add {overhead.planned:.2%} to the {unit}, at most "
        f"{max_overhead:.2%}; the largest would add {overhead.largest:.2%}"
    )


def warn_if_unaligned(names: list[str], alignment_strength: float):
    """
    Warn of inputs that alignment would make worse.

    :param names: first Linear of each input
    """
    if names:
        logger.warning(
            f"{len(names)} inputs are rotated without alignment, since they would lose SQNR "
            f"by it at `alignment_strength` {alignment_strength:g} (1 is optimal for "
            f"integers): {_some(names)}"
        )


def warn_of_unseen(unseen: list[SharedInput], bypassed: list[SharedInput], total: int):
    """
    Warn of inputs that calibration saw no tokens of.

    :param unseen: inputs that are rotated without alignment
    :param bypassed: inputs without a transform, of Linears that were not called
    :param total: number of targeted Linears
    """
    if unseen:
        names = [name for one in unseen for name in one.linears]
        logger.warning(
            f"{len(names)} of {total} Linears saw no calibration tokens, and are rotated "
            f"without alignment: {_some(names)}"
        )
    if bypassed:
        names = [name for one in bypassed for name in one.linears]
        logger.warning(
            f"{len(names)} of {total} Linears were not called, while the modules that "
            "hold them ran. Their weights seem to be read in another way, so that their "
            "inputs are not transformed. Add them to `ignore` of the modifier that "
            f"quantizes, too: {_some(names)}"
        )


def _some(names: list[str]) -> str:
    """List the first names"""
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _dtype(one: PlannedTransform) -> str:
    return str(one.transform.blocks.dtype).removeprefix("torch.")


def _bits(args: QuantizationArgs | None) -> int:
    return 16 if args is None else args.num_bits
