# SPDX-License-Identifier: Apache-2.0
"""No damaged checkpoint is silently wrong in Transformers, and errors name the part"""

import pytest
from mutations import mutations, outcomes, run_transformers


@pytest.mark.slow
def test_damage_is_named():
    found = [(str(one), *rest) for one, *rest in outcomes(run_transformers, mutations())]
    assert len(found) > 350
    assert not [one for one in found if one[1] in ("obscure", "wrong")]
    # before this package is asked: an index that is missing, or no JSON
    assert sum(outcome == "library" for _, outcome, _ in found) <= 2
    # what a loader does not read again: signs of weights and norms, and the quantization method
    unseen = [name for name, outcome, _ in found if outcome == "verify"]
    assert all(name.startswith("bit flipped") or "quant_method" in name for name in unseen)
