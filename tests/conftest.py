# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import pytest
from loguru import logger

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def logs(request):
    """Collect the log, from the LOG_LEVEL of the module or from warnings"""
    messages = []
    level = getattr(request.module, "LOG_LEVEL", "WARNING")
    sink = logger.add(lambda message: messages.append(str(message)), level=level)
    yield messages
    logger.remove(sink)
