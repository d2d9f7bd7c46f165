"""One thread at a time, where what one does to a module or to torch shows in all others."""

import threading

ONE_AT_A_TIME = threading.RLock()
"""Held while a module's tensors are replaced for a call, while they are looked up, and while torch and users' files are
patched for a trace."""
