"""What tests of hostile files share: a bound of memory and time."""

import time
import tracemalloc


def measured():
    """For a fixture: a test takes under 5 s, and 100 MB of Python's and NumPy's."""
    tracemalloc.start()
    began = time.process_time()
    yield
    seconds, (_, most) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100e6 and seconds < 5
