# SPDX-License-Identifier: Apache-2.0
"""No damaged checkpoint is silently wrong in Transformers, and errors name the part"""

import pytest
from mutations import mutations, outcomes, run_transformers


@pytest.mark.slow
def test_damage_is_named():
    found = [(str(one), *rest) for one, *rest in outcomes(run_transformers, mutations())]
    assert len(found) > 450
    assert not [one for one in found if one[1] in ("obscure", "wrong")]
    # before this package is asked: an index that is missing, or no JSON
    assert sum(outcome == "library" for _, outcome, _ in found) <= 4
    # what a loader does not read again: signs of weights and norms, the quantization method,
    # and numbers of the model that decide no shape
    unseen = {name for name, outcome, _ in found if outcome == "verify"}
    assert {name for name in unseen if not name.startswith("bit flipped")} <= {
        "field changed: quant_method",
        "field of the model changed: rms_norm_eps",
        "field of the model changed: rope_parameters.rope_theta",
    }
