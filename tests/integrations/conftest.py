"""What the hub client, TRL and datasets read once, when imported: no network, no telemetry, a cache of ours."""

import atexit
import os
import shutil
import tempfile

CACHE = tempfile.mkdtemp(prefix="mogeo-tests-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ.update(HF_HUB_OFFLINE="1", CI="1", HF_DATASETS_CACHE=CACHE, HF_DATASETS_DISABLE_PROGRESS_BARS="1")
os.environ.update(TQDM_DISABLE="1")
