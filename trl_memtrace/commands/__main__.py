"""``python -m trl_memtrace.commands``."""

from . import main

main()
