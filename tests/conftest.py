# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

import pytest
from loguru import logger

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def logs():
    """Collect the warnings of the log"""
    messages = []
    sink = logger.add(lambda message: messages.append(str(message)), level="WARNING")
    yield messages
    logger.remove(sink)
