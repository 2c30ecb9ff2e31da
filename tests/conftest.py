"""A shell has what it runs in the background ignore Ctrl-C, and so would all that tests start there."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
