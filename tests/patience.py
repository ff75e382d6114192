"""How much longer everything may take than on a machine of one's own; MUYBRIDGE_TEST_PATIENCE sets it, CI machines are slow."""

import os

PATIENCE = int(os.environ.get("MUYBRIDGE_TEST_PATIENCE", "3" if os.environ.get("CI") else "1"))
