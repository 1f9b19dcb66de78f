"""What all tests have in common. To be set before torch is imported: its threads spin for each
other as briefly as the worker's do, since other processes want the cores as well."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
