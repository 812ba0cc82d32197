"""Kill any part of a run at any moment: does it end with the weights that an undisturbed run has?"""

import os
import secrets
from pathlib import Path

# Ray reads them when it is imported, and clusters of several nodes are started by this very process.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

ROOT = Path(__file__).parent.parent.parent
