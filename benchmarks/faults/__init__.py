"""Fault injection: does a run in which any part fails end with the weights of an undisturbed run?"""

import os
import secrets
from pathlib import Path

# Ray reads them at import, and this process itself starts the clusters of several nodes.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

ROOT = Path(__file__).parent.parent.parent
