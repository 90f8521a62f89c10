"""One thread for every test, and for the processes that tests start: on tensors this small a second one only waits.

Set before torch is imported, which reads it once. Beside another busy process, two threads take ten times as long.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
